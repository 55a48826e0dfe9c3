//! Arguments of recent inputs, so that delivering them to a waiting container needs no read.

use std::collections::HashMap;

use ionian_domain::InputId;
use ionian_domain::call::InputPayload;
use ionian_domain::record::NewInput;
use parking_lot::Mutex;

/// Bytes of arguments kept in memory; older ones are read back from the store.
const CACHE_BYTES: usize = 16 * 1024 * 1024;
/// What an entry costs beside its arguments, which may be empty or lie in a blob.
const ENTRY_BYTES: usize = 256;

/// The newest arguments, by input.
pub struct Payloads {
    recent: Mutex<Recent>,
}

struct Recent {
    inputs: lru::LruCache<InputId, InputPayload>,
    bytes: usize,
}

fn weight(payload: &InputPayload) -> usize {
    payload.payload.inline_len() + ENTRY_BYTES
}

impl Default for Payloads {
    fn default() -> Self {
        Self {
            recent: Mutex::new(Recent {
                inputs: lru::LruCache::unbounded(),
                bytes: 0,
            }),
        }
    }
}

impl Payloads {
    pub(crate) fn remember(&self, inputs: &[NewInput]) {
        let mut recent = self.recent.lock();
        for input in inputs {
            recent.bytes += weight(&input.payload);
            if let Some(old) = recent.inputs.put(input.id, input.payload.clone()) {
                recent.bytes -= weight(&old);
            }
        }
        while recent.bytes > CACHE_BYTES {
            let Some((_, evicted)) = recent.inputs.pop_lru() else {
                break;
            };
            recent.bytes -= weight(&evicted);
        }
    }

    /// Takes what is known of these inputs; a retried input is read from the store.
    pub(crate) fn take(&self, ids: &[InputId]) -> HashMap<InputId, InputPayload> {
        let mut recent = self.recent.lock();
        let mut found = HashMap::new();
        for id in ids {
            if let Some(payload) = recent.inputs.pop(id) {
                recent.bytes -= weight(&payload);
                found.insert(*id, payload);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use ionian_domain::call::Payload;

    use super::*;

    fn input(length: usize) -> NewInput {
        NewInput {
            id: InputId::generate(),
            index: 0,
            payload: InputPayload {
                payload: Payload::Inline(Bytes::from(vec![0; length])),
                data_format: 4,
                method_name: None,
            },
        }
    }

    #[test]
    fn arguments_are_taken_once() {
        let payloads = Payloads::default();
        let one = input(3);
        payloads.remember(std::slice::from_ref(&one));
        assert_eq!(payloads.take(&[one.id])[&one.id], one.payload);
        assert!(payloads.take(&[one.id]).is_empty());
        assert_eq!(payloads.recent.lock().bytes, 0);
    }

    #[test]
    fn the_cache_is_bounded_also_where_arguments_are_empty() {
        let payloads = Payloads::default();
        let first = input(0);
        payloads.remember(std::slice::from_ref(&first));
        for _ in 0..CACHE_BYTES / ENTRY_BYTES {
            payloads.remember(&[input(0)]);
        }
        assert!(payloads.take(&[first.id]).is_empty());
        assert!(payloads.recent.lock().bytes <= CACHE_BYTES);
    }
}
