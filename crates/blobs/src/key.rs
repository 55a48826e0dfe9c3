//! Names under which [`crate::Blobs`] keeps bytes.

use std::fmt;
use std::str::FromStr;

use ionian_domain::BlobId;

use crate::hash::ContentHash;

/// A relative, slash-separated name that is safe as a path and as an object name: its segments hold
/// letters, digits, `-`, `_` and `.`, and do not begin with a dot.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(String);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a key: segments are letters, digits, '-', '_' and '.', joined by '/'")]
pub struct InvalidKey {
    pub text: String,
}

/// Keys come from our own code; longer ones would not fit every file system.
const MAX_KEY_LENGTH: usize = 512;

impl Key {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Where the content store keeps a file. Sharded by two characters, so that no directory holds
    /// every file.
    pub(crate) fn content(hash: &ContentHash) -> Self {
        let hex = hash.to_string();
        Self(format!("content/{}/{hex}", &hex[..2]))
    }

    pub(crate) fn blob_data(id: BlobId) -> Self {
        Self(format!("blobs/{}/{id}", &id.suffix()[..2]))
    }

    /// The sidecar that makes a blob visible: a blob exists when this does.
    pub(crate) fn blob_info(id: BlobId) -> Self {
        Self(format!("blobs/{}/{id}.json", &id.suffix()[..2]))
    }
}

impl FromStr for Key {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        let is_segment = |segment: &str| {
            !segment.is_empty()
                && !segment.starts_with('.')
                && segment
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        };
        if text.len() > MAX_KEY_LENGTH || !text.split('/').all(is_segment) {
            return Err(InvalidKey {
                text: text.chars().take(64).collect(),
            });
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_cannot_leave_their_root() {
        for bad in [
            "",
            "/",
            "/etc/passwd",
            "a//b",
            "../a",
            "a/../b",
            "a/.",
            "a/b ",
            "a\\b",
            "a/\0",
        ] {
            assert!(bad.parse::<Key>().is_err(), "{bad:?}");
        }
        assert_eq!(
            "logs/2026/a-b_c.json".parse::<Key>().unwrap().as_str(),
            "logs/2026/a-b_c.json"
        );
    }
}
