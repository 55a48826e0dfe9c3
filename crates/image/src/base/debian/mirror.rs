//! Which Debian mirror to use: the configured one, the host's own, or the public one.

use std::path::{Path, PathBuf};

use super::{DebianConfig, Release};
use crate::layers::layer_key;

const PUBLIC_ARCHIVE: &str = "http://deb.debian.org/debian";
const PUBLIC_SECURITY: &str = "http://deb.debian.org/debian-security";
/// Where Debian and its derivatives keep Debian's keys; a host that is not Debian trusts them not by itself.
const DEBIAN_KEYRINGS: &[&str] = &[
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
];
/// Source lists are short; anything longer is not one.
const MAX_SOURCES_BYTES: u64 = 1 << 20;

/// The mirrors for one release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mirrors {
    pub(super) archive: String,
    pub(super) security: Option<String>,
    pub(super) keyring: Option<PathBuf>,
    /// Whether the key ring is one that the image will not have by itself.
    pub(super) keyring_is_custom: bool,
    codename: &'static str,
}

impl Mirrors {
    pub(super) fn find(config: &DebianConfig, release: &Release) -> Self {
        let host = if config.mirror.is_none() {
            host_mirrors()
        } else {
            HostMirrors::default()
        };
        let archive = config
            .mirror
            .clone()
            .or(host.archive)
            .unwrap_or_else(|| PUBLIC_ARCHIVE.to_owned());
        let security = match config.security_mirror.clone() {
            Some(none) if none.is_empty() => None,
            Some(configured) => Some(configured),
            None => Some(host.security.unwrap_or_else(|| PUBLIC_SECURITY.to_owned())),
        };
        let shipped = || DEBIAN_KEYRINGS.iter().map(PathBuf::from).find(|path| path.is_file());
        Self {
            archive: archive.trim_end_matches('/').to_owned(),
            security: security.map(|url| url.trim_end_matches('/').to_owned()),
            keyring: config.keyring.clone().or_else(shipped),
            keyring_is_custom: config.keyring.is_some(),
            codename: release.codename,
        }
    }

    /// What decides which packages come; not a secret, but it may contain one, and so it is hashed.
    pub(super) fn identity(&self) -> String {
        layer_key(&[
            self.archive.as_str(),
            self.security.as_deref().unwrap_or(""),
            self.codename,
        ])
    }

    /// One-line sources, as mmdebstrap takes them.
    pub(super) fn source_lines(&self) -> Vec<String> {
        let (archive, codename) = (&self.archive, self.codename);
        let mut lines = vec![
            format!("deb {archive} {codename} main"),
            format!("deb {archive} {codename}-updates main"),
        ];
        lines.extend(
            self.security
                .iter()
                .map(|url| format!("deb {url} {codename}-security main")),
        );
        lines
    }

    /// The sources file of the image, in the form that Debian's own images have.
    pub(super) fn sources_file(&self, signed_by: &str) -> String {
        let (archive, codename) = (&self.archive, self.codename);
        let stanza = |url: &str, suites: &str| {
            format!("Types: deb\nURIs: {url}\nSuites: {suites}\nComponents: main\nSigned-By: {signed_by}\n")
        };
        let mut stanzas = vec![stanza(archive, &format!("{codename} {codename}-updates"))];
        stanzas.extend(
            self.security
                .iter()
                .map(|url| stanza(url, &format!("{codename}-security"))),
        );
        stanzas.join("\n")
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct HostMirrors {
    archive: Option<String>,
    security: Option<String>,
}

/// What this host installs its own packages from, if it is a Debian.
fn host_mirrors() -> HostMirrors {
    let os_release = read_small(Path::new("/etc/os-release"));
    if !os_release.lines().any(|line| line.trim() == "ID=debian") {
        return HostMirrors::default();
    }
    let mut texts = vec![one_line_uris(&read_small(Path::new("/etc/apt/sources.list")))];
    let mut files: Vec<PathBuf> = match std::fs::read_dir("/etc/apt/sources.list.d") {
        Ok(entries) => entries.filter_map(|entry| Some(entry.ok()?.path())).collect(),
        Err(_) => Vec::new(),
    };
    files.sort();
    for file in files {
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => texts.push(one_line_uris(&read_small(&file))),
            Some("sources") => texts.push(stanza_uris(&read_small(&file))),
            _ => {}
        }
    }
    choose(texts.into_iter().flatten())
}

/// A file that cannot be read says nothing about mirrors; there is a default.
fn read_small(path: &Path) -> String {
    let fits = std::fs::metadata(path).is_ok_and(|metadata| metadata.len() <= MAX_SOURCES_BYTES);
    if fits {
        std::fs::read_to_string(path).unwrap_or_default()
    } else {
        String::new()
    }
}

/// The first archive and the first security archive of Debian's own suites.
fn choose(sources: impl Iterator<Item = (String, String)>) -> HostMirrors {
    let mut mirrors = HostMirrors::default();
    for (uri, suite) in sources {
        // The host's other repositories (of vendors) have suites of other names. Snapshots stay where
        // they are on purpose; an image should not.
        let is_web = uri.starts_with("http://") || uri.starts_with("https://");
        if !is_web || uri.contains("snapshot.debian.org") || uri.contains('@') {
            continue;
        }
        let base = suite.split(['-', '/']).next().unwrap_or_default();
        if !super::recipe::is_codename(base) && !["stable", "oldstable", "testing"].contains(&base) {
            continue;
        }
        let slot = if suite.ends_with("-security") {
            &mut mirrors.security
        } else {
            &mut mirrors.archive
        };
        slot.get_or_insert(uri);
    }
    mirrors
}

/// `deb [options] URI suite components…`
fn one_line_uris(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for line in text.lines() {
        let Some(rest) = line.trim().strip_prefix("deb ") else {
            continue;
        };
        let rest = rest.trim_start();
        let rest = match rest.strip_prefix('[').and_then(|options| options.split_once(']')) {
            Some((_, rest)) => rest,
            None => rest,
        };
        let mut words = rest.split_whitespace();
        if let (Some(uri), Some(suite)) = (words.next(), words.next()) {
            found.push((uri.to_owned(), suite.to_owned()));
        }
    }
    found
}

/// Stanzas with `URIs:` and `Suites:`.
fn stanza_uris(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for stanza in text.split("\n\n") {
        let field = |name: &str| {
            stanza.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
            })
        };
        if field("Enabled").is_some_and(|value| value.eq_ignore_ascii_case("no")) {
            continue;
        }
        let (Some(uris), Some(suites)) = (field("URIs"), field("Suites")) else {
            continue;
        };
        for uri in uris.split_whitespace() {
            found.extend(
                suites
                    .split_whitespace()
                    .map(|suite| (uri.to_owned(), suite.to_owned())),
            );
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_mirror_is_found_among_other_repositories() {
        let one_line = "# deb http://old.example/debian bookworm main\n\
            deb https://packages.example/apt vendor main\n\
            deb [arch=amd64 signed-by=/k] http://mirror.example/debian/ bookworm main contrib\n";
        let stanzas = "Types: deb\nURIs: https://vendor.example\nSuites: nodistro\nComponents: main\n\n\
            Types: deb\nURIs: http://security.example/debian-security\nSuites: bookworm-security\n\n\
            Types: deb\nEnabled: no\nURIs: http://never.example\nSuites: bookworm-security\n";
        let mirrors = choose(one_line_uris(one_line).into_iter().chain(stanza_uris(stanzas)));
        assert_eq!(mirrors.archive.as_deref(), Some("http://mirror.example/debian/"));
        assert_eq!(
            mirrors.security.as_deref(),
            Some("http://security.example/debian-security")
        );
    }

    #[test]
    fn a_configured_mirror_wins_and_security_can_be_left_out() {
        let config = DebianConfig {
            mirror: Some("http://mirror.example/debian/".to_owned()),
            security_mirror: Some(String::new()),
            ..DebianConfig::default()
        };
        let mirrors = Mirrors::find(&config, &super::super::RELEASES[1]);
        assert_eq!(
            mirrors.source_lines(),
            [
                "deb http://mirror.example/debian bookworm main",
                "deb http://mirror.example/debian bookworm-updates main"
            ]
        );
        assert!(!mirrors.sources_file("/key").contains("security"));
    }

    #[test]
    fn snapshots_and_credentials_of_the_host_are_not_taken_over() {
        let text = "deb http://snapshot.debian.org/archive/debian/20250520T000000Z bookworm main\n\
            deb http://user:pass@mirror.example/debian bookworm main\n";
        assert_eq!(choose(one_line_uris(text).into_iter()), HostMirrors::default());
    }
}
