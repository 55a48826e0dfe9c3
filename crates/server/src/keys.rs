//! Key files: made once, readable by their owner only, apart from the database.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, bail};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

const KEY_LENGTH: usize = 32;
/// Given here, the key that seals secrets is nowhere on this machine's disk.
const SECRET_KEY_VARIABLE: &str = "IONIAN_SECRET_KEY";

pub(crate) struct Keys {
    /// Seals secrets.
    pub secret: Zeroizing<[u8; KEY_LENGTH]>,
    /// Signs blob URLs.
    pub urls: [u8; KEY_LENGTH],
    /// Signs container credentials.
    pub containers: [u8; KEY_LENGTH],
    /// Signs join tokens of workers.
    pub workers: [u8; KEY_LENGTH],
}

impl Keys {
    pub(crate) fn load(data_dir: &Path) -> anyhow::Result<Self> {
        let dir = data_dir.join("keys");
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))?;
        sync_directory(data_dir)?;
        let secret = match std::env::var(SECRET_KEY_VARIABLE) {
            Ok(text) => {
                decode(&text).with_context(|| format!("{SECRET_KEY_VARIABLE} is not {KEY_LENGTH} bytes in hex"))?
            }
            Err(_) => load_or_make(&dir.join("secrets.key"))?,
        };
        let signing = load_or_make(&dir.join("signing.key"))?;
        // Whatever gets sealed or signed is worth nothing without its key. Also where a key was found: whoever made it
        // may have been killed before this line.
        sync_directory(&dir)?;
        Ok(Self {
            secret,
            urls: derive(&signing, "blob urls"),
            containers: derive(&signing, "container credentials"),
            workers: derive(&signing, "worker join tokens"),
        })
    }
}

/// Two purposes never share a key.
fn derive(key: &Zeroizing<[u8; KEY_LENGTH]>, purpose: &str) -> [u8; KEY_LENGTH] {
    let mut hasher = Sha256::new();
    hasher.update(b"ionian key derivation\0");
    hasher.update(purpose.as_bytes());
    hasher.update([0]);
    hasher.update(key.as_slice());
    hasher.finalize().into()
}

fn decode(text: &str) -> anyhow::Result<Zeroizing<[u8; KEY_LENGTH]>> {
    let bytes = Zeroizing::new(hex::decode(text.trim())?);
    let Ok(key) = bytes.as_slice().try_into() else {
        bail!("it has {} bytes", bytes.len())
    };
    Ok(Zeroizing::new(key))
}

/// Makes the names in a directory survive a power cut.
fn sync_directory(path: &Path) -> anyhow::Result<()> {
    fs::File::open(path)
        .and_then(|directory| directory.sync_all())
        .with_context(|| format!("cannot sync {}", path.display()))
}

fn load_or_make(path: &Path) -> anyhow::Result<Zeroizing<[u8; KEY_LENGTH]>> {
    match fs::read_to_string(path) {
        Ok(text) => {
            let mode = fs::metadata(path)?.permissions().mode() & 0o777;
            if mode & 0o077 != 0 {
                bail!(
                    "{} can be read by others (mode {mode:o}); run: chmod 600 {}",
                    path.display(),
                    path.display()
                );
            }
            decode(&Zeroizing::new(text)).with_context(|| format!("{} is damaged", path.display()))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let key = Zeroizing::new(rand::random::<[u8; KEY_LENGTH]>());
            // Written aside and renamed: a crash leaves a whole key or none.
            let aside = path.with_extension("new");
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&aside)
                .with_context(|| format!("cannot write {}", aside.display()))?;
            file.write_all(hex::encode(key.as_slice()).as_bytes())?;
            file.sync_all()?;
            fs::rename(&aside, path)?;
            Ok(key)
        }
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_made_once_and_kept_private() {
        let dir = tempfile::tempdir().unwrap();
        let first = Keys::load(dir.path()).unwrap();
        let second = Keys::load(dir.path()).unwrap();
        assert_eq!(first.secret.as_slice(), second.secret.as_slice());
        assert_ne!(first.urls, first.containers);
        let path = dir.path().join("keys/secrets.key");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(Keys::load(dir.path()).is_err());
    }
}
