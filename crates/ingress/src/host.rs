//! Which hosts are web endpoints.
//!
//! Pure: a host name goes in, its meaning comes out. Ports are ignored and case does not matter.

use std::borrow::Cow;

/// What a request's host asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum HostKind<'a> {
    /// `<workspace>--<label>.<base domain>`; the label is in lower case.
    Web { label: Cow<'a, str> },
    /// Any other host: the platform itself.
    Bare,
}

pub(crate) fn classify<'a>(host: &'a str, base_domains: &[String]) -> HostKind<'a> {
    let name = without_port(host);
    let name = name.strip_suffix('.').unwrap_or(name);
    let Some((label, domain)) = name.split_once('.') else {
        return HostKind::Bare;
    };
    if label.contains("--") && base_domains.iter().any(|base| base.eq_ignore_ascii_case(domain)) {
        HostKind::Web { label: lower(label) }
    } else {
        HostKind::Bare
    }
}

pub(crate) fn without_port(host: &str) -> &str {
    if host.starts_with('[') {
        // An IPv6 literal; its colons are not port separators.
        return host.find(']').map_or(host, |end| &host[..=end]);
    }
    host.rsplit_once(':').map_or(host, |(name, _port)| name)
}

fn lower(label: &str) -> Cow<'_, str> {
    if label.bytes().any(|b| b.is_ascii_uppercase()) {
        Cow::Owned(label.to_ascii_lowercase())
    } else {
        Cow::Borrowed(label)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(host: &str) -> Option<String> {
        let domains = ["localhost".to_owned(), "apps.example.com".to_owned()];
        match classify(host, &domains) {
            HostKind::Web { label } => Some(label.into_owned()),
            HostKind::Bare => None,
        }
    }

    #[test]
    fn endpoints_are_found_under_every_base_domain() {
        assert_eq!(kind("main--hello-web.localhost").as_deref(), Some("main--hello-web"));
        assert_eq!(
            kind("main--hello-web.localhost:8800").as_deref(),
            Some("main--hello-web")
        );
        assert_eq!(
            kind("Main--Hello-Web.LOCALHOST:8800").as_deref(),
            Some("main--hello-web")
        );
        assert_eq!(kind("main--hello.apps.example.com").as_deref(), Some("main--hello"));
        assert_eq!(kind("main--hello.localhost.").as_deref(), Some("main--hello"));
    }

    #[test]
    fn other_hosts_are_the_platform() {
        for host in [
            "localhost:8800",
            "127.0.0.1:8800",
            "[::1]:8800",
            "[::1]",
            "",
            "main--hello",
            "main--hello.example.com",
            "deep.main--hello.localhost",
            "plain.localhost",
        ] {
            assert_eq!(kind(host), None, "{host}");
        }
    }
}
