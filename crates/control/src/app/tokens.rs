//! API tokens: made by `ionian token new`, checked on every request.

use ionian_domain::{ErrorKind, TokenId};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::error::{Error, Result};
use crate::{Caller, Control};

pub struct Tokens<'a>(pub(crate) &'a Control);

/// A secret is drawn from 256 random bits, so one round of SHA-256 is as good as a slow hash.
pub fn hash_secret(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

impl Tokens<'_> {
    /// The caller behind a token pair.
    pub async fn authenticate(&self, token_id: &str, token_secret: &str, client_version: &str) -> Result<Caller> {
        let refused = || {
            Error::unauthenticated(
                "the token is not valid on this server: make one with `ionian token new`, and set MODAL_TOKEN_ID and \
                 MODAL_TOKEN_SECRET to what it prints",
            )
        };
        let id: TokenId = token_id.parse().map_err(|_| refused())?;
        let record = self.0.store().tokens().find_recent(id).await?.ok_or_else(refused)?;
        let matches: bool = hash_secret(token_secret).ct_eq(&record.secret_hash).into();
        if !matches {
            return Err(refused());
        }
        if record.revoked_at.is_some() {
            return Err(Error::new(
                ErrorKind::Unauthenticated,
                format!("the token {id} was revoked; make a new one with `ionian token new`"),
            ));
        }
        Ok(Caller::Client {
            token_id: id,
            token_name: record.name,
            client_version: client_version.to_owned(),
        })
    }
}
