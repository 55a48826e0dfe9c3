//! Secrets at rest: XChaCha20-Poly1305 under a key that lies apart from the database.

use std::collections::BTreeMap;

use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use hmac::{Hmac, Mac};
use ionian_domain::SecretId;
use sha2::Sha256;
use zeroize::Zeroizing;

/// Bytes before the ciphertext: a version and the nonce.
const NONCE_LENGTH: usize = 24;
const VERSION: u8 = 1;

/// Seals and opens the values of secrets.
#[derive(Clone)]
pub struct Sealer {
    cipher: XChaCha20Poly1305,
    /// Draws names from values; a key of its own, so that names say nothing about the cipher's.
    name_key: Zeroizing<[u8; 32]>,
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sealer").finish_non_exhaustive()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum SealError {
    #[error("secret {0} cannot be opened: it was sealed with another key than the one in the secret key file")]
    WrongKey(SecretId),
    #[error("secret {0} is damaged in the database")]
    Damaged(SecretId),
}

impl Sealer {
    pub fn new(key: &Zeroizing<[u8; 32]>) -> Self {
        Self {
            cipher: XChaCha20Poly1305::new(key.as_slice().try_into().expect("the key has 32 bytes")),
            name_key: Zeroizing::new(keyed(key.as_slice(), &[b"ionian names of secrets"])),
        }
    }

    /// A name for these values: equal values in one scope have one name, and without the key nobody can
    /// tell from a name which values it stands for.
    pub fn name(&self, scope: &str, values: &BTreeMap<String, String>) -> SecretId {
        let plain = Zeroizing::new(serde_json::to_vec(values).expect("a map of strings is JSON"));
        SecretId::from_digest(&keyed(self.name_key.as_slice(), &[scope.as_bytes(), b"\0", &plain]))
    }

    /// The id is bound in, so that a row's values cannot be moved to another secret.
    pub fn seal(&self, id: SecretId, values: &BTreeMap<String, String>) -> Vec<u8> {
        let nonce_bytes: [u8; NONCE_LENGTH] = rand::random();
        let nonce = XNonce::from(nonce_bytes);
        let plain = Zeroizing::new(serde_json::to_vec(values).expect("a map of strings is JSON"));
        let aad = id.to_string();
        let ciphertext = self
            .cipher
            .encrypt(
                &nonce,
                Payload {
                    msg: &plain,
                    aad: aad.as_bytes(),
                },
            )
            .expect("sealing fails only beyond 256 GiB");
        let mut sealed = Vec::with_capacity(1 + NONCE_LENGTH + ciphertext.len());
        sealed.push(VERSION);
        sealed.extend_from_slice(&nonce_bytes);
        sealed.extend_from_slice(&ciphertext);
        sealed
    }

    pub fn open(&self, id: SecretId, sealed: &[u8]) -> Result<BTreeMap<String, String>, SealError> {
        let (version, rest) = sealed.split_first().ok_or(SealError::Damaged(id))?;
        if *version != VERSION || rest.len() < NONCE_LENGTH {
            return Err(SealError::Damaged(id));
        }
        let (nonce, ciphertext) = rest.split_at(NONCE_LENGTH);
        let nonce: [u8; NONCE_LENGTH] = nonce.try_into().map_err(|_| SealError::Damaged(id))?;
        let aad = id.to_string();
        let plain = self
            .cipher
            .decrypt(
                &XNonce::from(nonce),
                Payload {
                    msg: ciphertext,
                    aad: aad.as_bytes(),
                },
            )
            .map_err(|_| SealError::WrongKey(id))?;
        serde_json::from_slice(&Zeroizing::new(plain)).map_err(|_| SealError::Damaged(id))
    }
}

fn keyed(key: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealer(byte: u8) -> Sealer {
        Sealer::new(&Zeroizing::new([byte; 32]))
    }

    #[test]
    fn what_is_sealed_opens_with_the_same_key_and_id_only() {
        let values = BTreeMap::from([("API_KEY".to_owned(), "s3cr3t-value".to_owned())]);
        let id = SecretId::generate();
        let sealed = sealer(1).seal(id, &values);
        assert!(!sealed.windows(12).any(|window| window == b"s3cr3t-value"));
        assert_eq!(sealer(1).open(id, &sealed).unwrap(), values);
        assert!(matches!(sealer(2).open(id, &sealed), Err(SealError::WrongKey(_))));
        assert!(matches!(
            sealer(1).open(SecretId::generate(), &sealed),
            Err(SealError::WrongKey(_))
        ));
        assert!(matches!(sealer(1).open(id, &sealed[..10]), Err(SealError::Damaged(_))));
    }

    #[test]
    fn equal_values_have_one_name_per_scope_and_key() {
        let values = |value: &str| BTreeMap::from([("A".to_owned(), value.to_owned())]);
        let name = sealer(1).name("main", &values("1"));
        assert_eq!(name, sealer(1).name("main", &values("1")));
        assert_ne!(name, sealer(1).name("main", &values("2")));
        assert_ne!(name, sealer(1).name("other", &values("1")));
        assert_ne!(name, sealer(2).name("main", &values("1")));
    }
}
