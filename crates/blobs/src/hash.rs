//! Checksums as values: SHA-256, which names content, and MD5, which the upload protocol uses as `ETag`.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use md5::{Digest, Md5};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::Sha256;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not {wanted}")]
pub struct InvalidHash {
    pub text: String,
    pub wanted: &'static str,
}

impl InvalidHash {
    fn new(text: &str, wanted: &'static str) -> Self {
        // Hashes come from clients: the message must not echo a megabyte back.
        Self {
            text: text.chars().take(96).collect(),
            wanted,
        }
    }
}

macro_rules! digest {
    ($(#[$doc:meta])* $name:ident, $length:literal, $hasher:ty, $hex:literal, $base64:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $length]);

        impl $name {
            pub fn of(bytes: &[u8]) -> Self {
                Self::from_hasher(<$hasher>::new_with_prefix(bytes))
            }

            pub(crate) fn from_hasher(hasher: $hasher) -> Self {
                Self(hasher.finalize().into())
            }

            /// Reads the standard, padded base64 form that upload requests carry.
            pub fn from_base64(text: &str) -> Result<Self, InvalidHash> {
                let bytes = STANDARD.decode(text).map_err(|_| InvalidHash::new(text, $base64))?;
                let bytes = bytes.try_into().map_err(|_| InvalidHash::new(text, $base64))?;
                Ok(Self(bytes))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidHash;

            /// Accepts lower case only, since the text is also a file name: one content, one name.
            fn from_str(text: &str) -> Result<Self, InvalidHash> {
                let mut bytes = [0; $length];
                if text.bytes().any(|byte| byte.is_ascii_uppercase()) || hex::decode_to_slice(text, &mut bytes).is_err()
                {
                    return Err(InvalidHash::new(text, $hex));
                }
                Ok(Self(bytes))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

digest!(/// The SHA-256 of some content, and its name in the content store.
    ContentHash, 32, Sha256, "a SHA-256 in hex (64 lower-case digits)", "a SHA-256 in base64");
digest!(/// An MD5: not for security, but the checksum that upload clients compare.
    Md5Digest, 16, Md5, "an MD5 in hex (32 lower-case digits)", "an MD5 in base64");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_and_base64_name_the_same_hash() {
        let hash = ContentHash::of(b"hello");
        assert_eq!(
            hash.to_string(),
            "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
        );
        assert_eq!(hash.to_string().parse(), Ok(hash));
        assert_eq!(
            ContentHash::from_base64("LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ="),
            Ok(hash)
        );
        assert_eq!(Md5Digest::of(b"hello").to_string(), "5d41402abc4b2a76b9719d911017c592");
    }

    #[test]
    fn other_texts_are_not_hashes() {
        let upper = ContentHash::of(b"").to_string().to_uppercase();
        for bad in [
            "",
            "abc",
            "../../etc/passwd",
            upper.as_str(),
            &"0".repeat(63),
            &"g".repeat(64),
        ] {
            assert!(bad.parse::<ContentHash>().is_err(), "{bad:?}");
        }
        assert!(ContentHash::from_base64("LPJNul").is_err());
    }
}
