//! What a call has to know of its function, kept in memory.
//!
//! A definition can hold megabytes of serialized code, and calls come by the hundreds per second. All
//! writes of functions go through control, which drops what they change.

use ionian_domain::function::{Function, RetryPolicy};
use ionian_domain::{AppId, ErrorKind, FunctionId};
use parking_lot::Mutex;

use crate::Control;
use crate::error::{Error, Result};

/// More functions than are called at one time; each costs some hundred bytes.
const KEPT: usize = 4_096;

/// The callable part of a function, at the definition that runs.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct CallTarget {
    pub app_id: AppId,
    pub function_id: FunctionId,
    pub retry: RetryPolicy,
    name: String,
    methods: Vec<String>,
}

impl CallTarget {
    fn new(function: Function) -> Self {
        Self {
            app_id: function.app_id,
            function_id: function.id,
            retry: function.spec.retry,
            name: function.spec.name,
            methods: function.spec.methods,
        }
    }

    /// Refuses an input that the container could only crash on.
    pub(crate) fn check_method(&self, method: Option<&str>) -> Result<()> {
        match method {
            Some(method) if !method.is_empty() && !self.methods.iter().any(|known| known == method) => {
                let class = self.name.trim_end_matches(".*");
                Err(Error::new(
                    ErrorKind::InvalidArgument,
                    format!(
                        "'{class}' has no method '{method}'; it has: {}",
                        self.methods.join(", ")
                    ),
                ))
            }
            Some(_) | None => Ok(()),
        }
    }
}

/// Targets of recent calls.
pub(crate) struct CallTargets {
    kept: Mutex<Kept>,
}

struct Kept {
    targets: lru::LruCache<FunctionId, CallTarget>,
    /// Counts changes: what was read before one must not be kept after it.
    changes: u64,
}

impl Default for CallTargets {
    fn default() -> Self {
        let size = std::num::NonZeroUsize::new(KEPT).expect("a positive number");
        Self {
            kept: Mutex::new(Kept {
                targets: lru::LruCache::new(size),
                changes: 0,
            }),
        }
    }
}

impl CallTargets {
    /// The definition that runs has changed, or will in a moment.
    pub(crate) fn forget(&self, id: FunctionId) {
        let mut kept = self.kept.lock();
        kept.changes += 1;
        kept.targets.pop(&id);
    }

    pub(crate) async fn get(&self, control: &Control, id: FunctionId) -> Result<CallTarget> {
        let changes = {
            let mut kept = self.kept.lock();
            if let Some(target) = kept.targets.get(&id) {
                return Ok(target.clone());
            }
            kept.changes
        };
        let target = CallTarget::new(control.functions().get_running(id).await?);
        let mut kept = self.kept.lock();
        if kept.changes == changes {
            kept.targets.put(id, target.clone());
        }
        Ok(target)
    }
}
