//! URLs that are permissions: whoever has one may do one thing with one blob until it expires.
//!
//! Clients send no credentials to blob URLs, so the URL carries a signature over method, path and expiry:
//!
//! ```text
//! http://127.0.0.1:8800/_blobs/v1/part/bl-…/3?expires=1790000000&signature=<64 hex digits>
//! ```
//!
//! The part before the path is given with each call, since a URL is made for the address by which its
//! receiver reaches the platform, and is not signed.

use std::fmt;
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use ionian_domain::{BlobId, Timestamp};
use sha2::Sha256;

use crate::upload::Upload;

/// The client asks for upload URLs right before it uses them, and a large file may take hours.
pub const UPLOAD_URL_LIFETIME: Duration = Duration::from_hours(24);
/// The client asks for a download URL right before it uses it, and repeats a broken download five times.
pub const DOWNLOAD_URL_LIFETIME: Duration = Duration::from_hours(1);

/// Keeps these signatures apart from any other use of the same key.
const CONTEXT: &str = "ionian url v1";

/// One thing that a URL permits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// Upload the whole blob with one PUT.
    PutWhole { blob_id: BlobId },
    /// Upload one part, numbered from 1.
    PutPart { blob_id: BlobId, part: u32 },
    /// Say that all parts are there.
    Complete { blob_id: BlobId },
    /// Read the blob, or ask for its size.
    Get { blob_id: BlobId },
}

impl Capability {
    pub fn method(&self) -> &'static str {
        match self {
            Self::PutWhole { .. } | Self::PutPart { .. } => "PUT",
            Self::Complete { .. } => "POST",
            Self::Get { .. } => "GET",
        }
    }

    pub fn path(&self) -> String {
        match self {
            Self::PutWhole { blob_id } => format!("/_blobs/v1/put/{blob_id}/0"),
            Self::PutPart { blob_id, part } => format!("/_blobs/v1/part/{blob_id}/{part}"),
            Self::Complete { blob_id } => format!("/_blobs/v1/complete/{blob_id}/0"),
            Self::Get { blob_id } => format!("/_blobs/v1/get/{blob_id}/0"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidUrl {
    #[error("the URL's signature is missing or wrong")]
    Forged,
    #[error("the URL has expired; ask for a new one")]
    Expired,
}

/// Everything a client needs to upload one blob. The API encodes it so that every client finds the form
/// that it knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UploadPlan {
    pub blob_id: BlobId,
    /// Takes the whole blob, of any length.
    pub single_put_url: String,
    /// The length of every part but the last.
    pub part_length: u64,
    /// At least one.
    pub part_urls: Vec<String>,
    pub completion_url: String,
}

#[derive(Clone)]
pub struct UrlSigner {
    key: [u8; 32],
}

impl fmt::Debug for UrlSigner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UrlSigner")
    }
}

impl UrlSigner {
    pub fn new(key: [u8; 32]) -> Self {
        Self { key }
    }

    /// The URLs of an upload. `base` is `scheme://host[:port]`.
    pub fn upload_plan(&self, base: &str, upload: &Upload, expires_at: Timestamp) -> UploadPlan {
        let blob_id = upload.blob_id;
        let url = |capability| self.url(base, capability, expires_at);
        UploadPlan {
            blob_id,
            single_put_url: url(Capability::PutWhole { blob_id }),
            part_length: upload.part_length,
            part_urls: (1..=upload.part_count)
                .map(|part| url(Capability::PutPart { blob_id, part }))
                .collect(),
            completion_url: url(Capability::Complete { blob_id }),
        }
    }

    pub fn download_url(&self, base: &str, blob_id: BlobId, expires_at: Timestamp) -> String {
        self.url(base, Capability::Get { blob_id }, expires_at)
    }

    /// Makes the URL for one capability.
    pub fn url(&self, base: &str, capability: Capability, expires_at: Timestamp) -> String {
        let signed = self.sign(capability.method(), &capability.path(), expires_at);
        format!("{}{signed}", base.trim_end_matches('/'))
    }

    /// Signs any method and path of ours; returns the path with `expires` and `signature` added. For
    /// other signed resources than blobs; the path has no query of its own.
    pub fn sign(&self, method: &str, path: &str, expires_at: Timestamp) -> String {
        let expires = expires_at.micros().div_euclid(1_000_000);
        let signature = hex::encode(self.mac(method, path, expires).finalize().into_bytes());
        format!("{path}?expires={expires}&signature={signature}")
    }

    /// Checks what [`Self::sign`] made. `expires` and `signature` are the texts found in the query.
    pub fn verify(
        &self,
        method: &str,
        path: &str,
        expires: &str,
        signature: &str,
        now: Timestamp,
    ) -> Result<(), InvalidUrl> {
        let expires: i64 = expires.parse().map_err(|_| InvalidUrl::Forged)?;
        let signature = hex::decode(signature).map_err(|_| InvalidUrl::Forged)?;
        // Compares in constant time.
        self.mac(method, path, expires)
            .verify_slice(&signature)
            .map_err(|_| InvalidUrl::Forged)?;
        // Only who once had a good URL is told that it expired.
        if now.micros().div_euclid(1_000_000) >= expires {
            return Err(InvalidUrl::Expired);
        }
        Ok(())
    }

    /// Checks the query of a request for one capability.
    pub fn verify_capability(
        &self,
        capability: Capability,
        expires: &str,
        signature: &str,
        now: Timestamp,
    ) -> Result<(), InvalidUrl> {
        self.verify(capability.method(), &capability.path(), expires, signature, now)
    }

    fn mac(&self, method: &str, path: &str, expires: i64) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.key).expect("HMAC takes keys of any length");
        // None of the fields can hold a line break, so different fields never make the same text.
        mac.update(format!("{CONTEXT}\n{method}\n{path}\n{expires}").as_bytes());
        mac
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(1_790_000_000_000_000);

    fn split(url: &str) -> (String, String, String) {
        let (path, query) = url.split_once('?').unwrap();
        let (expires, signature) = query.split_once('&').unwrap();
        let path = path.strip_prefix("http://127.0.0.1:8800").unwrap().to_owned();
        (
            path,
            expires.strip_prefix("expires=").unwrap().to_owned(),
            signature.strip_prefix("signature=").unwrap().to_owned(),
        )
    }

    #[test]
    fn a_url_permits_one_thing_until_it_expires() {
        let signer = UrlSigner::new([7; 32]);
        let blob_id = BlobId::generate();
        let part = Capability::PutPart { blob_id, part: 3 };
        let url = signer.url("http://127.0.0.1:8800/", part, NOW + Duration::from_mins(1));
        let (path, expires, signature) = split(&url);
        assert_eq!(path, format!("/_blobs/v1/part/{blob_id}/3"));
        let check = |capability, now| signer.verify_capability(capability, &expires, &signature, now);
        assert_eq!(check(part, NOW), Ok(()));
        assert_eq!(check(part, NOW + Duration::from_secs(59)), Ok(()));
        assert_eq!(check(part, NOW + Duration::from_mins(1)), Err(InvalidUrl::Expired));
        for other in [
            Capability::PutPart { blob_id, part: 4 },
            Capability::PutPart {
                blob_id: BlobId::generate(),
                part: 3,
            },
            Capability::PutWhole { blob_id },
            Capability::Complete { blob_id },
            Capability::Get { blob_id },
        ] {
            assert_eq!(check(other, NOW), Err(InvalidUrl::Forged), "{other:?}");
        }
    }

    #[test]
    fn any_change_is_a_forgery() {
        let signer = UrlSigner::new([7; 32]);
        let get = Capability::Get {
            blob_id: BlobId::generate(),
        };
        let (_, expires, signature) = split(&signer.url("http://127.0.0.1:8800", get, NOW));
        let later = (expires.parse::<i64>().unwrap() + 1_000_000).to_string();
        let mut flipped = signature.clone().into_bytes();
        flipped[0] = if flipped[0] == b'0' { b'1' } else { b'0' };
        let flipped = String::from_utf8(flipped).unwrap();
        for (expires, signature) in [
            (later.as_str(), signature.as_str()),
            (&expires, &flipped),
            (&expires, &signature[..62]),
            (&expires, ""),
            ("", &signature),
            ("soon", &signature),
        ] {
            let verified = signer.verify_capability(get, expires, signature, Timestamp(0));
            assert_eq!(verified, Err(InvalidUrl::Forged));
        }
        let stranger = UrlSigner::new([8; 32]);
        let verified = stranger.verify_capability(get, &expires, &signature, Timestamp(0));
        assert_eq!(verified, Err(InvalidUrl::Forged));
    }

    #[test]
    fn the_key_is_not_printed() {
        assert_eq!(format!("{:?}", UrlSigner::new([7; 32])), "UrlSigner");
    }

    #[test]
    fn a_plan_has_a_url_for_each_part() {
        let upload = Upload {
            blob_id: BlobId::generate(),
            content_length: 25,
            part_length: 10,
            part_count: 3,
        };
        let plan = UrlSigner::new([1; 32]).upload_plan("https://example.com", &upload, NOW);
        assert_eq!(plan.part_urls.len(), 3);
        assert!(plan.part_urls[2].starts_with(&format!("https://example.com/_blobs/v1/part/{}/3?", upload.blob_id)));
        assert!(plan.single_put_url.contains("/put/") && plan.completion_url.contains("/complete/"));
    }
}
