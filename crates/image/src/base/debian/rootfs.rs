//! Arranges what mmdebstrap made so that it looks like the official images.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use super::mirror::Mirrors;
use super::{BaseError, Flavor, Recipe, Release};

/// What slim images leave out of packages, those installed later included.
pub(super) const DPKG_EXCLUDES: &[&str] = &[
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/groff/*",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/linda/*",
    "path-exclude=/usr/share/locale/*",
    // 60 MB that only who embeds Python statically needs.
    "path-exclude=/usr/lib/python3*/config-*/libpython*.a",
    "path-exclude=/usr/lib/*/libpython*.a",
];

/// apt as in Debian's container images: no caches kept, since they would become part of layers.
const APT_CONF: &str = r#"// Packages and caches would become part of image layers.
DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/archives/partial/*.deb /var/cache/apt/*.bin || true"; };
APT::Update::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/archives/partial/*.deb /var/cache/apt/*.bin || true"; };
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Acquire::GzipIndexes "true";
Apt::AutoRemove::SuggestsImportant "false";
"#;

/// Services must not start when their package is installed in an image.
const POLICY_RC_D: &str = "#!/bin/sh\nexit 101\n";

const DEBIAN_KEYRINGS: &[&str] = &[
    "usr/share/keyrings/debian-archive-keyring.gpg",
    "usr/share/keyrings/debian-archive-keyring.pgp",
];
const CUSTOM_KEYRING: &str = "usr/share/keyrings/ionian-mirror.gpg";

/// The text of dpkg's status file for a whole desktop has 5 MB.
const MAX_STATUS_BYTES: u64 = 64 << 20;

/// A hook of mmdebstrap: pip installs itself from the wheels that Debian ships for `venv`.
///
/// Debian's own package of pip could not be upgraded by pip, which official images can.
pub(super) fn seed_hook(release: &Release) -> String {
    let wheels = release.seed_wheels.join(" ");
    format!(
        "chroot \"$1\" sh -ec 'rm -f /usr/lib/python3*/EXTERNALLY-MANAGED; \
         export PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1; \
         for pip in /usr/share/python-wheels/pip-*.whl; do \
         python3 $pip/pip install -q --no-index --no-cache-dir --find-links /usr/share/python-wheels {wheels}; done'"
    )
}

/// Everything that is done after mmdebstrap.
pub(super) fn arrange(root: &Path, recipe: &Recipe, mirrors: &Mirrors) -> Result<(), BaseError> {
    // What mmdebstrap copied from this host, and what only it needed.
    for name in [
        "etc/apt/sources.list",
        "etc/hostname",
        "etc/resolv.conf",
        "var/lib/dpkg/lock",
        "var/lib/dpkg/lock-frontend",
    ] {
        remove_file(&root.join(name))?;
    }
    for dir in [
        "var/lib/apt/lists",
        "var/cache/apt/archives",
        "var/cache/debconf",
        "var/log",
        "tmp",
        "run",
        "dev",
    ] {
        empty_dir(&root.join(dir))?;
    }
    // apt writes these and fails without their directories.
    for dir in [
        "var/lib/apt/lists/partial",
        "var/cache/apt/archives/partial",
        "var/log/apt",
        "run/lock",
    ] {
        create_dir(&root.join(dir))?;
    }
    write(&root.join("etc/machine-id"), "")?;
    write(&root.join("etc/apt/apt.conf.d/docker-clean"), APT_CONF)?;
    write(&root.join("usr/sbin/policy-rc.d"), POLICY_RC_D)?;
    set_mode(&root.join("usr/sbin/policy-rc.d"), 0o755)?;

    let keyring = if let Some(custom) = mirrors.keyring.as_ref().filter(|_| mirrors.keyring_is_custom) {
        let target = root.join(CUSTOM_KEYRING);
        fs::copy(custom, &target).map_err(|source| io_error("copy the key ring to", &target, source))?;
        set_mode(&target, 0o644)?;
        CUSTOM_KEYRING
    } else {
        DEBIAN_KEYRINGS
            .iter()
            .find(|name| root.join(name).is_file())
            .unwrap_or(&DEBIAN_KEYRINGS[0])
    };
    let sources = mirrors.sources_file(&format!("/{keyring}"));
    write(&root.join("etc/apt/sources.list.d/debian.sources"), &sources)?;

    match recipe.flavor {
        Flavor::Plain => Ok(()),
        Flavor::Python => arrange_python(root, recipe.release.python),
    }
}

fn arrange_python(root: &Path, minor: &str) -> Result<(), BaseError> {
    let bin = root.join("usr/local/bin");
    let python = format!("python{minor}");
    for (name, target) in [
        ("python", python.clone()),
        ("python3", python.clone()),
        (python.as_str(), python.clone()),
        ("python3-config", format!("{python}-config")),
        ("python-config", format!("{python}-config")),
        ("pydoc3", format!("pydoc{minor}")),
        ("pydoc", format!("pydoc{minor}")),
    ] {
        let link = bin.join(name);
        let target = format!("/usr/bin/{target}");
        symlink(target, &link).map_err(|source| io_error("make the link", &link, source))?;
    }
    // The seed hook ran; without what it made, the image would fail much later and less clearly.
    for name in ["pip", "pip3"] {
        let path = bin.join(name);
        fs::metadata(&path).map_err(|source| io_error("find", &path, source))?;
    }
    Ok(())
}

/// The version of Python that is installed, out of dpkg's records: `3.11.2`.
pub(super) fn python_version(root: &Path, minor: &str) -> Result<String, BaseError> {
    let path = root.join("var/lib/dpkg/status");
    let length = fs::metadata(&path)
        .map_err(|source| io_error("inspect", &path, source))?
        .len();
    if length > MAX_STATUS_BYTES {
        return Err(io_error("read", &path, io::Error::other("it is too large")));
    }
    let status = fs::read(&path).map_err(|source| io_error("read", &path, source))?;
    version_in(&String::from_utf8_lossy(&status), &format!("python{minor}"))
        .ok_or_else(|| io_error("find Python in", &path, io::ErrorKind::NotFound.into()))
}

fn version_in(status: &str, package: &str) -> Option<String> {
    let stanza = status.split("\n\n").find(|stanza| {
        stanza.lines().any(|line| {
            line.strip_prefix("Package: ")
                .is_some_and(|name| name.trim() == package)
        })
    })?;
    let version = stanza.lines().find_map(|line| line.strip_prefix("Version: "))?;
    // Debian's own parts are an epoch in front and a revision behind.
    let version = version.split_once(':').map_or(version, |(_, rest)| rest);
    Some(version.split(['-', '+', '~']).next()?.trim().to_owned())
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> BaseError {
    BaseError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

fn write(path: &Path, text: &str) -> Result<(), BaseError> {
    fs::write(path, text).map_err(|source| io_error("write", path, source))?;
    set_mode(path, 0o644)
}

fn set_mode(path: &Path, mode: u32) -> Result<(), BaseError> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(|source| io_error("set the mode of", path, source))
}

fn create_dir(path: &Path) -> Result<(), BaseError> {
    fs::create_dir_all(path).map_err(|source| io_error("create", path, source))?;
    set_mode(path, 0o755)
}

fn remove_file(path: &Path) -> Result<(), BaseError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path, source)),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn empty_dir(path: &Path) -> Result<(), BaseError> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(source) if source.kind() == io::ErrorKind::NotFound => return create_dir(path),
        Err(source) => return Err(io_error("list", path, source)),
    };
    for entry in entries {
        let entry = entry.map_err(|source| io_error("list", path, source))?;
        let path = entry.path();
        let is_dir = entry
            .file_type()
            .map_err(|source| io_error("inspect", &path, source))?
            .is_dir();
        let removed = if is_dir {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        removed.map_err(|source| io_error("remove", &path, source))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_patch_version_is_read_from_dpkg() {
        let status = "Package: python3\nStatus: install ok installed\nVersion: 3.11.2-1+b1\n\n\
            Package: python3.11\nStatus: install ok installed\nVersion: 3.11.2-6+deb12u6\n\n";
        assert_eq!(version_in(status, "python3.11").as_deref(), Some("3.11.2"));
        assert_eq!(
            version_in("Package: python3.13\nVersion: 3.13.5-2\n", "python3.13").as_deref(),
            Some("3.13.5")
        );
        assert_eq!(
            version_in("Package: x\nVersion: 1:2.3~rc1-4\n", "x").as_deref(),
            Some("2.3")
        );
        assert_eq!(version_in(status, "python3.12"), None);
    }
}
