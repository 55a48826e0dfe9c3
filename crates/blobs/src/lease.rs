//! Who is writing to which upload, so that no two writers touch the same bytes.
//!
//! Clients repeat a part whose connection died, while this side may still wait for the dead connection.
//! So a newcomer supersedes the older writer of the same part, and waits until that one's last write has
//! ended. Completing an upload excludes all of its writers: whatever still writes then belongs to an
//! attempt that the client has given up.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ionian_domain::BlobId;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

/// A superseded writer ends after its current disk write; a completion hashes at most one blob. Longer
/// waits mean an overloaded disk, and the client had better come back later.
const CLAIM_PATIENCE: Duration = Duration::from_mins(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    Part(u32),
    Whole,
}

impl Claim {
    fn conflicts_with(self, other: Self) -> bool {
        match (self, other) {
            (Self::Part(part), Self::Part(other)) => part == other,
            (Self::Whole, Self::Part(_)) | (Self::Part(_) | Self::Whole, Self::Whole) => true,
        }
    }
}

#[derive(Debug)]
struct Holder {
    claim: Claim,
    superseded: CancellationToken,
    released: CancellationToken,
}

#[derive(Debug, Default, Clone)]
pub(crate) struct Leases {
    holders: Arc<Mutex<HashMap<BlobId, Vec<Holder>>>>,
}

/// The right to write; ends on drop. It travels with the writing work into blocking threads, so that it
/// outlives a caller that is dropped in the middle of a write.
#[derive(Debug)]
pub(crate) struct Lease {
    leases: Leases,
    id: BlobId,
    claim: Claim,
    superseded: CancellationToken,
    released: CancellationToken,
}

/// The upload stayed in use by others for as long as we were willing to wait.
#[derive(Debug)]
pub(crate) struct InUse;

impl Leases {
    pub(crate) async fn claim(&self, id: BlobId, claim: Claim) -> Result<Lease, InUse> {
        let claimed = async {
            loop {
                match self.claim_or_supersede(id, claim) {
                    Ok(lease) => return lease,
                    Err(released) => released.cancelled().await,
                }
            }
        };
        tokio::time::timeout(CLAIM_PATIENCE, claimed).await.map_err(|_| InUse)
    }

    /// The whole upload, if nobody uses any of it.
    pub(crate) fn claim_idle(&self, id: BlobId) -> Option<Lease> {
        let mut holders = self.holders.lock();
        if holders.contains_key(&id) {
            return None;
        }
        Some(self.grant(&mut holders, id, Claim::Whole))
    }

    fn claim_or_supersede(&self, id: BlobId, claim: Claim) -> Result<Lease, CancellationToken> {
        let mut holders = self.holders.lock();
        let mut blocked_by = None;
        for holder in holders.get(&id).into_iter().flatten() {
            if !claim.conflicts_with(holder.claim) {
                continue;
            }
            match holder.claim {
                Claim::Part(_) => holder.superseded.cancel(),
                // A completion is never cut short: whoever waits for it finds its result.
                Claim::Whole => {}
            }
            blocked_by = Some(holder.released.clone());
        }
        match blocked_by {
            Some(released) => Err(released),
            None => Ok(self.grant(&mut holders, id, claim)),
        }
    }

    fn grant(&self, holders: &mut HashMap<BlobId, Vec<Holder>>, id: BlobId, claim: Claim) -> Lease {
        let superseded = CancellationToken::new();
        let released = CancellationToken::new();
        let holder = Holder {
            claim,
            superseded: superseded.clone(),
            released: released.clone(),
        };
        holders.entry(id).or_default().push(holder);
        Lease {
            leases: self.clone(),
            id,
            claim,
            superseded,
            released,
        }
    }
}

impl Lease {
    pub(crate) fn superseded(&self) -> CancellationToken {
        self.superseded.clone()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut holders = self.leases.holders.lock();
        if let Some(of_upload) = holders.get_mut(&self.id) {
            of_upload.retain(|holder| holder.claim != self.claim);
            if of_upload.is_empty() {
                holders.remove(&self.id);
            }
        }
        drop(holders);
        self.released.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_repeated_part_supersedes_its_predecessor_and_waits_for_it() {
        let leases = Leases::default();
        let id = BlobId::generate();
        let first = leases.claim(id, Claim::Part(1)).await.unwrap();
        let other = leases.claim(id, Claim::Part(2)).await.unwrap();
        let second = tokio::spawn({
            let leases = leases.clone();
            async move { leases.claim(id, Claim::Part(1)).await.unwrap() }
        });
        first.superseded().cancelled().await;
        assert!(!second.is_finished());
        assert!(!other.superseded().is_cancelled());
        drop(first);
        second.await.unwrap();
    }

    #[tokio::test]
    async fn completing_excludes_writers_and_is_not_superseded() {
        let leases = Leases::default();
        let id = BlobId::generate();
        let whole = leases.claim(id, Claim::Whole).await.unwrap();
        assert!(leases.claim_idle(id).is_none());
        assert!(leases.claim_idle(BlobId::generate()).is_some());
        let part = tokio::spawn({
            let leases = leases.clone();
            async move { leases.claim(id, Claim::Part(7)).await.unwrap() }
        });
        tokio::task::yield_now().await;
        assert!(!whole.superseded().is_cancelled());
        drop(whole);
        drop(part.await.unwrap());
        assert!(leases.holders.lock().is_empty());
    }
}
