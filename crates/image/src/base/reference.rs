//! Names of base images, as `FROM` and `COPY --from` have them.

use std::fmt;

use oci_client::Reference;

use super::BaseError;

/// Registries allow 255 characters of name and 128 of tag; a digest has 71.
const MAX_REFERENCE_LENGTH: usize = 512;

const DOCKER_HUB: &str = "docker.io";

/// A parsed image name: `python:3.11-slim`, `ghcr.io/owner/name:tag`, `host:5000/name@sha256:…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseReference {
    oci: Reference,
}

impl BaseReference {
    pub fn parse(text: &str) -> Result<Self, BaseError> {
        let invalid = |why: String| BaseError::InvalidReference {
            reference: text.chars().take(128).collect(),
            why,
        };
        if text.len() > MAX_REFERENCE_LENGTH {
            return Err(invalid(format!("it is longer than {MAX_REFERENCE_LENGTH} characters")));
        }
        let oci: Reference = text.parse().map_err(|error| invalid(format!("{error}")))?;
        // The registry becomes part of URLs and file names.
        let plain = |name: &str| {
            name.bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b".-_:/".contains(&byte))
        };
        if !plain(oci.registry()) || !plain(oci.repository()) || oci.repository().split('/').any(|part| part == "..") {
            return Err(invalid("its name has characters that no image name has".to_owned()));
        }
        Ok(Self { oci })
    }

    pub(super) fn oci(&self) -> &Reference {
        &self.oci
    }

    pub fn registry(&self) -> &str {
        self.oci.registry()
    }

    /// The name without registry, such as `library/python`.
    pub fn repository(&self) -> &str {
        self.oci.repository()
    }

    /// The tag; `latest` where the reference has neither tag nor digest.
    pub fn tag(&self) -> Option<&str> {
        self.oci.tag()
    }

    pub fn digest(&self) -> Option<&str> {
        self.oci.digest()
    }

    /// `python` for Docker Hub's `library/python`, otherwise `None`.
    pub(super) fn docker_official(&self) -> Option<&str> {
        if self.registry() == DOCKER_HUB {
            self.repository().strip_prefix("library/")
        } else {
            None
        }
    }

    /// The name as people write it: `python`, `user/name` (Docker Hub), `ghcr.io/owner/name`.
    pub(super) fn familiar_name(&self) -> String {
        match self.docker_official() {
            Some(name) => name.to_owned(),
            None if self.registry() == DOCKER_HUB => self.repository().to_owned(),
            None => self.full_name(),
        }
    }

    /// The name with its registry, without tag and digest.
    pub(super) fn full_name(&self) -> String {
        format!("{}/{}", self.registry(), self.repository())
    }
}

impl fmt::Display for BaseReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.familiar_name())?;
        if let Some(tag) = self.tag() {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = self.digest() {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_completed_as_docker_does() {
        let cases = [
            ("python", "docker.io", "library/python", Some("latest"), "python:latest"),
            (
                "python:3.11-slim",
                "docker.io",
                "library/python",
                Some("3.11-slim"),
                "python:3.11-slim",
            ),
            (
                "mambaorg/micromamba:2.1",
                "docker.io",
                "mambaorg/micromamba",
                Some("2.1"),
                "mambaorg/micromamba:2.1",
            ),
            (
                "docker.io/library/debian:12",
                "docker.io",
                "library/debian",
                Some("12"),
                "debian:12",
            ),
            ("ghcr.io/a/b:1", "ghcr.io", "a/b", Some("1"), "ghcr.io/a/b:1"),
            (
                "localhost:5000/a",
                "localhost:5000",
                "a",
                Some("latest"),
                "localhost:5000/a:latest",
            ),
        ];
        for (text, registry, repository, tag, shown) in cases {
            let reference = BaseReference::parse(text).unwrap();
            assert_eq!(reference.registry(), registry, "{text}");
            assert_eq!(reference.repository(), repository, "{text}");
            assert_eq!(reference.tag(), tag, "{text}");
            assert_eq!(reference.to_string(), shown, "{text}");
        }
    }

    #[test]
    fn a_digest_needs_no_tag() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let reference = BaseReference::parse(&format!("ghcr.io/a/b@{digest}")).unwrap();
        assert_eq!((reference.tag(), reference.digest()), (None, Some(digest.as_str())));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for text in [
            "",
            "a/UPPER",
            "a b",
            "../etc/passwd",
            "python:",
            "a:b:c",
            "$BASE",
            &"a/".repeat(400),
        ] {
            assert!(
                matches!(BaseReference::parse(text), Err(BaseError::InvalidReference { .. })),
                "{text}"
            );
        }
    }
}
