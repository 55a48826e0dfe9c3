//! What builds and containers take over from the host so that downloads work behind a corporate proxy:
//! its CA bundle, and the proxy and package index settings that the operator names.
//!
//! The bundle is bound at a path of our own and announced by environment variables. It is not bound over
//! `/etc/ssl/certs/ca-certificates.crt`, because installing the package `ca-certificates` renames a new
//! file over that one, which fails on a mount point.

use std::path::{Path, PathBuf};

use crate::step::StepBind;

/// Where the host's CA bundle is seen in builds and containers.
pub const CA_BUNDLE_TARGET: &str = "/__ionian/ca-certificates.crt";

/// The variables by which TLS clients find a bundle: OpenSSL (also Go and uv), requests, pip, curl, Node,
/// git, AWS tools, cargo.
const CA_BUNDLE_VARIABLES: [&str; 8] = [
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "PIP_CERT",
    "CURL_CA_BUNDLE",
    "NODE_EXTRA_CA_CERTS",
    "GIT_SSL_CAINFO",
    "AWS_CA_BUNDLE",
    "CARGO_HTTP_CAINFO",
];

/// Where distributions keep the bundle: Debian and Alpine, Fedora, SUSE.
const HOST_BUNDLES: [&str; 3] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
];

/// Settings that say how to reach the network and not what is there: they change no result.
const TRANSPORT_VARIABLES: [&str; 5] = ["http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy"];

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostTrust {
    /// On this host; `None` shares none.
    pub ca_bundle: Option<PathBuf>,
    /// Such as `PIP_INDEX_URL` or `HTTPS_PROXY`. In the environment of `RUN` steps, not in the image.
    pub env: Vec<(String, String)>,
}

impl HostTrust {
    /// The host's bundle where one of the usual places has it, and no settings.
    pub fn detect() -> Self {
        let ca_bundle = HOST_BUNDLES
            .iter()
            .map(Path::new)
            .find(|path| path.is_file())
            .map(Path::to_owned);
        Self {
            ca_bundle,
            env: Vec::new(),
        }
    }

    /// The variables to add to an environment; what it already sets is the user's wish and stays.
    pub fn trust_env(&self, present: &[(String, String)]) -> Vec<(String, String)> {
        let bundle = self.ca_bundle.iter().flat_map(|_| {
            CA_BUNDLE_VARIABLES
                .iter()
                .map(|name| ((*name).to_owned(), CA_BUNDLE_TARGET.to_owned()))
        });
        let mut added: Vec<(String, String)> = Vec::new();
        // The operator's own settings win over what we would set.
        for (name, value) in self.env.iter().cloned().chain(bundle) {
            if present.iter().chain(&added).all(|(other, _)| *other != name) {
                added.push((name, value));
            }
        }
        added
    }

    pub fn binds(&self) -> Vec<StepBind> {
        let bind = |source: &PathBuf| StepBind {
            source: source.clone(),
            target: CA_BUNDLE_TARGET.to_owned(),
            read_only: true,
        };
        self.ca_bundle.iter().map(bind).collect()
    }

    /// The settings that can change what a step produces (an index, not a proxy), for its key.
    pub(crate) fn result_settings(&self) -> Vec<(String, String)> {
        let mut settings: Vec<_> = self
            .env
            .iter()
            .filter(|(name, _)| !TRANSPORT_VARIABLES.contains(&name.to_ascii_lowercase().as_str()))
            .cloned()
            .collect();
        settings.sort();
        settings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(name: &str, value: &str) -> (String, String) {
        (name.to_owned(), value.to_owned())
    }

    #[test]
    fn what_the_image_sets_stays() {
        let trust = HostTrust {
            ca_bundle: Some("/host.crt".into()),
            env: vec![pair("HTTPS_PROXY", "http://proxy"), pair("PIP_CERT", "/operator.crt")],
        };
        let added = trust.trust_env(&[pair("SSL_CERT_FILE", "/mine.crt"), pair("HTTPS_PROXY", "")]);
        assert!(
            !added
                .iter()
                .any(|(name, _)| name == "SSL_CERT_FILE" || name == "HTTPS_PROXY")
        );
        assert!(added.contains(&pair("PIP_CERT", "/operator.crt")));
        assert!(added.contains(&pair("CURL_CA_BUNDLE", CA_BUNDLE_TARGET)));
        assert_eq!(trust.binds().len(), 1);
    }

    #[test]
    fn without_a_bundle_nothing_points_to_one() {
        let trust = HostTrust::default();
        assert_eq!((trust.trust_env(&[]), trust.binds()), (vec![], vec![]));
    }

    #[test]
    fn a_proxy_changes_no_result_and_an_index_does() {
        let trust = HostTrust {
            ca_bundle: None,
            env: vec![pair("NO_PROXY", "x"), pair("PIP_INDEX_URL", "https://index")],
        };
        assert_eq!(trust.result_settings(), [pair("PIP_INDEX_URL", "https://index")]);
    }
}
