//! Who a container runs as: a Dockerfile's `USER`, looked up in the container's own files.
//!
//! The files belong to the image and are not trusted: they are opened as if the container's root were `/`, so
//! that a symbolic link cannot lead to the host's.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};

/// No honest passwd or group file is larger.
const MAX_FILE_BYTES: u64 = 4 << 20;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub uid: u32,
    pub gid: u32,
    pub additional_gids: Vec<u32>,
}

impl Identity {
    pub(crate) const ROOT: Self = Self {
        uid: 0,
        gid: 0,
        additional_gids: Vec::new(),
    };
}

/// `user` is `name`, `uid`, `name:group` or `uid:gid`. The error is a reason for people.
pub(crate) fn resolve(root: &Path, user: &str) -> Result<Identity, String> {
    let passwd = read_inside(root, "etc/passwd").map_err(|error| format!("failed to read its /etc/passwd: {error}"))?;
    let group = read_inside(root, "etc/group").map_err(|error| format!("failed to read its /etc/group: {error}"))?;
    look_up(&passwd, &group, user)
}

fn look_up(passwd: &str, groups: &str, user: &str) -> Result<Identity, String> {
    let (user, group) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (user, None),
    };
    let entry = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find_map(|fields| match fields[..] {
            [name, _, uid, gid, ..] if name == user || (uid == user && uid.parse::<u32>().is_ok()) => {
                Some((name.to_owned(), uid.parse::<u32>().ok()?, gid.parse::<u32>().ok()?))
            }
            _ => None,
        });
    let (name, uid, primary) = match (entry, user.parse::<u32>()) {
        (Some(entry), _) => entry,
        // A number needs no entry; it then has the group that Docker gives it.
        (None, Ok(uid)) => (user.to_owned(), uid, 0),
        (None, Err(_)) => return Err(format!("the image's /etc/passwd has no user {user:?}")),
    };
    let rows = || groups.lines().map(|line| line.split(':').collect::<Vec<_>>());
    if let Some(group) = group.filter(|group| !group.is_empty()) {
        let named = rows().find_map(|fields| match fields[..] {
            [name, _, gid, ..] if name == group => gid.parse::<u32>().ok(),
            _ => None,
        });
        let Some(gid) = named.or_else(|| group.parse().ok()) else {
            return Err(format!("the image's /etc/group has no group {group:?}"));
        };
        return Ok(Identity {
            uid,
            gid,
            additional_gids: Vec::new(),
        });
    }
    let additional_gids = rows()
        .filter_map(|fields| match fields[..] {
            [_, _, gid, members] if members.split(',').any(|member| member.trim() == name) => gid.parse::<u32>().ok(),
            _ => None,
        })
        .filter(|gid| *gid != primary)
        .collect();
    Ok(Identity {
        uid,
        gid: primary,
        additional_gids,
    })
}

/// Empty if there is no such file.
fn read_inside(root: &Path, path: &str) -> io::Result<String> {
    let root = openat(
        CWD,
        root,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    // Never blocks on a named pipe that an image put there.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = match openat2(&root, path, flags, Mode::empty(), resolve) {
        Ok(file) => File::from(file),
        Err(rustix::io::Errno::NOENT) => return Ok(String::new()),
        Err(error) => return Err(error.into()),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1001:,,,:/home/web:/bin/sh\nbroken\n";
    const GROUP: &str = "root:x:0:\nweb:x:1001:\naudio:x:29:web,other\nvideo:x:44:other\n";

    fn identity(uid: u32, gid: u32, additional_gids: &[u32]) -> Identity {
        Identity {
            uid,
            gid,
            additional_gids: additional_gids.to_vec(),
        }
    }

    #[test]
    fn users_are_found_by_name_and_number_with_their_groups() {
        let look_up = |user| look_up(PASSWD, GROUP, user);
        assert_eq!(look_up("web"), Ok(identity(1000, 1001, &[29])));
        assert_eq!(look_up("1000"), Ok(identity(1000, 1001, &[29])));
        assert_eq!(look_up("web:video"), Ok(identity(1000, 44, &[])));
        assert_eq!(look_up("web:5"), Ok(identity(1000, 5, &[])));
        assert_eq!(look_up("4242"), Ok(identity(4242, 0, &[])));
        assert_eq!(look_up("root"), Ok(identity(0, 0, &[])));
        assert!(look_up("nobody-here").unwrap_err().contains("nobody-here"));
        assert!(look_up("web:nothing").unwrap_err().contains("nothing"));
    }

    #[test]
    fn links_do_not_lead_out_of_the_root() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("passwd"), "evil:x:7:7::/:/bin/sh\n").unwrap();
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::os::unix::fs::symlink(outside.path().join("passwd"), root.path().join("etc/passwd")).unwrap();
        assert!(resolve(root.path(), "evil").is_err());
        std::fs::remove_file(root.path().join("etc/passwd")).unwrap();
        assert_eq!(resolve(root.path(), "12:34"), Ok(identity(12, 34, &[])));
    }
}
