//! Join tokens: what a process presents to be taken in as a worker.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

const PREFIX: &str = "wj-";
/// Random bytes of a token's name.
const NAME_BYTES: usize = 12;

/// Makes and checks join tokens. Nothing is stored: a token is a name with a signature, and is worthless under
/// another key.
#[derive(Clone)]
pub struct JoinTokens {
    key: [u8; 32],
}

impl JoinTokens {
    /// `key` signs nothing else, and never leaves the process.
    pub fn new(key: [u8; 32]) -> Self {
        Self { key }
    }

    pub fn issue(&self) -> String {
        let name = hex::encode(rand::random::<[u8; NAME_BYTES]>());
        let signature = hex::encode(self.mac(&name).finalize().into_bytes());
        format!("{PREFIX}{name}.{signature}")
    }

    /// Compares in constant time.
    pub fn is_valid(&self, token: &str) -> bool {
        let parts = token.strip_prefix(PREFIX).and_then(|token| token.split_once('.'));
        let Some((name, signature)) = parts else {
            return false;
        };
        hex::decode(signature).is_ok_and(|signature| self.mac(name).verify_slice(&signature).is_ok())
    }

    fn mac(&self, name: &str) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.key).expect("HMAC takes keys of any length");
        mac.update(b"ionian worker join token\0");
        mac.update(name.as_bytes());
        mac
    }
}

impl std::fmt::Debug for JoinTokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JoinTokens").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tokens_of_this_key_are_valid() {
        let tokens = JoinTokens::new([1; 32]);
        let token = tokens.issue();
        assert!(tokens.is_valid(&token));
        assert_ne!(token, tokens.issue());
        assert!(!JoinTokens::new([2; 32]).is_valid(&token));
        let (name, signature) = token.split_once('.').unwrap();
        for forged in [
            String::new(),
            name.to_owned(),
            format!("{name}."),
            format!("{name}0.{signature}"),
            format!("{name}.{}", "00".repeat(32)),
            token.trim_start_matches(PREFIX).to_owned(),
        ] {
            assert!(!tokens.is_valid(&forged), "{forged}");
        }
    }
}
