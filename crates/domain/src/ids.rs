//! Object ids: a two-letter prefix that the wire checks, a dash, and 22 base62 characters.
//!
//! The official client recognises ids by shape (an app is exactly `ap-[A-Za-z0-9]{22}`), so every id
//! here has that shape. Ids are `Copy`, ordered and hashable; their text form is the wire form.

use std::fmt;
use std::str::FromStr;

use rand::RngExt;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

const SUFFIX_LENGTH: usize = 22;
const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// A text that is not an id of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not {kind} id (expected '{prefix}-' and 22 letters or digits)")]
pub struct InvalidId {
    pub text: String,
    pub kind: &'static str,
    pub prefix: &'static str,
}

fn random_suffix() -> [u8; SUFFIX_LENGTH] {
    let mut rng = rand::rng();
    std::array::from_fn(|_| ALPHABET[rng.random_range(0..ALPHABET.len())])
}

/// Maps any bytes to a suffix, so that equal content gets an equal id (images, mounts, bound functions).
fn suffix_of_digest(digest: &[u8; 32]) -> [u8; SUFFIX_LENGTH] {
    // 22 characters carry 131 bits; one byte per character would waste a little entropy per
    // character (log2(62) of 8 bits) and leaves 22 * 5.95 = 131 bits of a 256-bit digest.
    std::array::from_fn(|i| ALPHABET[usize::from(digest[i]) % ALPHABET.len()])
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; SUFFIX_LENGTH]);

        impl $name {
            pub const PREFIX: &'static str = $prefix;

            /// Draws a new random id.
            pub fn generate() -> Self {
                Self(fix_last(random_suffix()))
            }

            /// The id that stands for this content: equal digests give equal ids.
            pub fn from_digest(digest: &[u8; 32]) -> Self {
                Self(fix_last(suffix_of_digest(digest)))
            }

            /// The 22 characters after the prefix.
            pub fn suffix(&self) -> &str {
                std::str::from_utf8(&self.0).expect("an id holds base62 characters only")
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "-{}"), self.suffix())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let invalid = || InvalidId {
                    // Ids come from clients: the message must not echo a megabyte back.
                    text: text.chars().take(64).collect(),
                    kind: $kind,
                    prefix: $prefix,
                };
                let suffix = text.strip_prefix(concat!($prefix, "-")).ok_or_else(invalid)?;
                let suffix: [u8; SUFFIX_LENGTH] = suffix.as_bytes().try_into().map_err(|_| invalid())?;
                if !suffix.iter().all(u8::is_ascii_alphanumeric) {
                    return Err(invalid());
                }
                Ok(Self(suffix))
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

/// The client reads a trailing `V` of a task id as "belongs to a second-generation sandbox".
fn fix_last(mut suffix: [u8; SUFFIX_LENGTH]) -> [u8; SUFFIX_LENGTH] {
    if suffix[SUFFIX_LENGTH - 1] == b'V' {
        suffix[SUFFIX_LENGTH - 1] = b'v';
    }
    suffix
}

id!(/// An app: the unit of deployment.
    AppId, "ap", "an app");
id!(/// A host that runs containers. Drawn once, kept in the worker's data directory.
    WorkerId, "wk", "a worker");
id!(/// A function, a class's service function, or a bound variant of either.
    FunctionId, "fu", "a function");
id!(/// A class object of an app.
    ClassId, "cs", "a class");
id!(/// One version of a function's definition.
    DefinitionId, "de", "a definition");
id!(/// A call of a function, with one input or many.
    CallId, "fc", "a function call");
id!(/// One input of a call.
    InputId, "in", "an input");
id!(/// A container; the wire calls it a task.
    ContainerId, "ta", "a container");
id!(/// An image.
    ImageId, "im", "an image");
id!(/// A set of files laid over a container's file system.
    MountId, "mo", "a mount");
id!(/// A secret.
    SecretId, "st", "a secret");
id!(/// A volume.
    VolumeId, "vo", "a volume");
id!(/// An environment.
    EnvironmentId, "en", "an environment");
id!(/// The workspace (there is one per server).
    WorkspaceId, "ac", "a workspace");
id!(/// A blob.
    BlobId, "bl", "a blob");
id!(/// An API token's public half.
    TokenId, "ak", "a token");

impl InputId {
    /// The id of one of the inputs that came with one request. They differ in their last characters only:
    /// inputs of a request are recorded together, and ids that are neighbours in an index cost one page of it
    /// where random ones cost a page each.
    pub fn of_request(request: &[u8; 32], position: u16) -> Self {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut suffix = suffix_of_digest(request);
        let (_, last) = suffix.split_at_mut(SUFFIX_LENGTH - 4);
        for (place, digit) in last.iter_mut().enumerate() {
            *digit = DIGITS[usize::from(position >> (12 - 4 * place) & 0xf)];
        }
        Self(suffix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_round_trips() {
        let id = AppId::generate();
        assert_eq!(id.to_string().parse::<AppId>(), Ok(id));
        assert_eq!(id.to_string().len(), 25);
    }

    #[test]
    fn foreign_prefix_and_bad_length_are_refused() {
        let id = AppId::generate().to_string();
        assert!(id.parse::<FunctionId>().is_err());
        assert!(id[..24].parse::<AppId>().is_err());
        assert!("ap-!!!!!!!!!!!!!!!!!!!!!!".parse::<AppId>().is_err());
    }

    #[test]
    fn inputs_of_a_request_are_neighbours_and_differ() {
        let ids: Vec<InputId> = (0..=u16::MAX).map(|n| InputId::of_request(&[7; 32], n)).collect();
        assert!(ids.is_sorted_by(|one, next| one < next));
        assert_eq!(ids[0].suffix()[..18], ids[65_535].suffix()[..18]);
        assert_eq!(ids[258].to_string().parse::<InputId>(), Ok(ids[258]));
        assert_ne!(ids[0], InputId::of_request(&[8; 32], 0));
    }

    #[test]
    fn container_ids_never_look_like_sandbox_tasks() {
        for _ in 0..2_000 {
            assert!(!ContainerId::generate().to_string().ends_with('V'));
        }
    }

    #[test]
    fn equal_content_has_an_equal_id() {
        assert_eq!(ImageId::from_digest(&[7; 32]), ImageId::from_digest(&[7; 32]));
        assert_ne!(ImageId::from_digest(&[7; 32]), ImageId::from_digest(&[8; 32]));
    }
}
