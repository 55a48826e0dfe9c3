//! Containers of an earlier process: which of them may be adopted, and their adoption.
//!
//! One may be adopted if it was started so, by a run of this machine, and its keeper still runs (it waits for a
//! reader after the container's end) or has told the exit status. Everything else is reaped when the runtime is
//! opened.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ionian_domain::container::StartTimings;

use super::Inner;
use super::leftovers::{Leftovers, paths_of};
use crate::config::ContainerConfig;
use crate::gvisor::SignalRelay;
use crate::keeper::record::{Record, StartedRecord};
use crate::keeper::{self, Keeper, Kept, Readers};
use crate::network::{Network, Policy, Slot, Survivor};
use crate::oci::OciProgram;
use crate::running::{ContainerHandle, MainProcess, Remains, RunningContainer, Started};
use crate::runtime::{DisposeError, ReapError};

/// A container that lives on, before there is a network.
pub(super) struct Found {
    record: Record,
    started: StartedRecord,
}

impl Found {
    pub(super) fn host_link(&self) -> Option<String> {
        Some(self.started.network.as_ref()?.host_link.clone())
    }

    /// What its address may reach, if that is limited.
    pub(super) fn policy(&self) -> Option<Policy> {
        self.started.network.as_ref()?.policy()
    }

    pub(super) fn is_reachable_in(&self, survivor: Option<&Survivor>) -> bool {
        match (&self.started.network, survivor) {
            (None, _) => true,
            (Some(network), Some(survivor)) => survivor.subnet.contains(network.address),
            (Some(_), None) => false,
        }
    }
}

/// One that nobody has asked for yet. It keeps its address taken.
pub(super) struct Adoptable {
    found: Found,
    slot: Option<Slot>,
}

impl Adoptable {
    pub(super) fn is_of(&self, program: &OciProgram) -> bool {
        self.found.started.runtime == program.kind()
    }
}

/// Reads what is written down about containers. Blocks.
pub(super) fn find(config: &ContainerConfig, boot_id: &str) -> Result<BTreeMap<String, Found>, ReapError> {
    let directory = config.specifications_dir();
    let failed = |source| ReapError::Read {
        path: directory.clone(),
        source,
    };
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(&directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        match look_at(&entry.path(), boot_id) {
            Ok(Some(container)) => {
                found.insert(name, container);
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(container = name, %error, "failed to look for a container's keeper"),
        }
    }
    Ok(found)
}

fn look_at(directory: &Path, boot_id: &str) -> io::Result<Option<Found>> {
    let Some(record) = Record::read(directory, boot_id) else {
        return Ok(None);
    };
    let Some(started) = record.started.clone().filter(|started| started.outlives_us) else {
        return Ok(None);
    };
    // A zombie's number is not free yet, so its end is asked for as well.
    let lives = match record.keeper.open()? {
        Some(pidfd) => !keeper::has_ended(&pidfd, Duration::ZERO),
        None => false,
    };
    Ok((lives || keeper::read_exit(directory).is_some()).then_some(Found { record, started }))
}

/// Takes their addresses.
pub(super) fn take_over(found: BTreeMap<String, Found>, network: &Network) -> BTreeMap<String, Adoptable> {
    let mut adoptable = BTreeMap::new();
    for (name, found) in found {
        let slot = match &found.started.network {
            None => None,
            Some(record) => match network.take_over_slot(record) {
                Some(slot) => Some(slot),
                None => {
                    tracing::error!(
                        container = name,
                        ?record,
                        "a container's address is not free; it is not adopted"
                    );
                    continue;
                }
            },
        };
        adoptable.insert(name, Adoptable { found, slot });
    }
    adoptable
}

pub(super) fn adopt(inner: &Arc<Inner>, program: &Arc<OciProgram>, name: &str) -> Option<RunningContainer> {
    let adoptable = {
        let mut live = inner.live();
        if live.shut_down {
            return None;
        }
        if !live.adoptable.get(name)?.is_of(program) {
            return None;
        }
        let adoptable = live.adoptable.remove(name)?;
        live.names.insert(name.to_owned());
        adoptable
    };
    match adopt_all_of(inner, program, name, adoptable) {
        Ok(container) => Some(container),
        Err(error) => {
            tracing::error!(container = name, %error, "failed to adopt a container; it is killed");
            None
        }
    }
}

/// A failure drops the leftovers, which kills and removes.
fn adopt_all_of(
    inner: &Arc<Inner>,
    program: &Arc<OciProgram>,
    name: &str,
    adoptable: Adoptable,
) -> io::Result<RunningContainer> {
    let Adoptable { found, slot } = adoptable;
    let StartedRecord {
        first_process,
        id_range,
        ..
    } = found.started;
    let address = slot.as_ref().map(Slot::address);
    let mut leftovers = Leftovers::taken_over(inner, program, name, slot, id_range);
    let directory = leftovers.paths.specification.clone();
    let keeper = Arc::new(Keeper::adopt(&found.record.keeper, &directory)?);
    leftovers.keeper = Some(Arc::clone(&keeper));
    let (stdout, stderr, readers) = Readers::open(&directory)?;
    let pid = first_process.pid;
    let handle = ContainerHandle::open(name, pid, || first_process.is_current())?;
    if program.sandboxing.is_some() {
        let relay = SignalRelay::new(&program.path, &inner.config.runc_root(), &inner.config.short_id(), name);
        handle.relay_signals(relay);
    }
    Ok(RunningContainer::new(Started {
        name: name.to_owned(),
        pid,
        address,
        stdout,
        stderr,
        timings: StartTimings::default(),
        handle,
        main: MainProcess::Kept(Kept { keeper, readers }),
        remains: Box::new(leftovers),
    }))
}

/// Kills and removes what nobody has asked for. Blocks. Goes on after a failure; returns the first.
pub(super) fn discard(inner: &Arc<Inner>, program: &Arc<OciProgram>) -> Result<(), DisposeError> {
    let adoptable = {
        let mut live = inner.live();
        let adoptable = std::mem::take(&mut live.adoptable);
        live.names.extend(adoptable.keys().cloned());
        adoptable
    };
    let mut results = Vec::new();
    for (name, Adoptable { found, slot }) in adoptable {
        let id_range = found.started.id_range;
        let mut leftovers = Box::new(Leftovers::taken_over(inner, program, &name, slot, id_range));
        match Keeper::adopt(&found.record.keeper, &paths_of(&inner.config, &name).specification) {
            Ok(keeper) => leftovers.keeper = Some(Arc::new(keeper)),
            Err(error) => tracing::error!(container = name, %error, "failed to look for a container's keeper"),
        }
        results.push(leftovers.remove());
    }
    results.into_iter().collect()
}
