//! What is looked after by the clock: sessions that fell silent, and what has been kept for long enough.

use std::time::Duration;

use ionian_domain::Timestamp;
use ionian_scheduler::Event;
use ionian_store::calls::Expiry;
use tokio_util::sync::CancellationToken;

use crate::app::builds::Builds;
use crate::error::Result;
use crate::{Control, logs};

/// How often sessions, streams and results that were read are looked at.
const SHORT_PERIOD: Duration = Duration::from_secs(10);
/// How often what is old is removed.
const LONG_PERIOD: Duration = Duration::from_hours(1);
/// The first removal waits until the start is over.
const FIRST_REMOVAL: Duration = Duration::from_mins(1);
/// Results are kept for so long; the hosted product keeps them for as long.
const RESULT_RETENTION: Duration = Duration::from_hours(7 * 24);
/// Results that their caller has. Not at once: the answer may have been lost, and the client asks again.
const CONSUMED_RETENTION: Duration = Duration::from_hours(1);
/// An upload to which nothing happened for so long is given up: its URLs have expired.
const UPLOAD_RETENTION: Duration = ionian_blobs::UPLOAD_URL_LIFETIME;
/// Rows removed at a time; between two batches, turns get their chance.
const BATCH: u32 = 200;

/// Runs until cancelled.
pub(crate) async fn run_short(control: Control, cancel: CancellationToken) {
    while wait(&cancel, SHORT_PERIOD).await {
        control.sweep().await;
    }
}

impl Control {
    /// Looks after sessions, streams and results that were read. Happens by itself every ten seconds.
    pub async fn sweep(&self) {
        report(
            "abandoned apps could not be stopped",
            self.apps().stop_abandoned().await,
        );
        report("read results could not be noted", note_consumed(self).await);
        self.streams().sweep();
        self.logs().forget_idle();
    }
}

/// Runs until cancelled.
pub(crate) async fn run_long(control: Control, cancel: CancellationToken) {
    if let Err(error) = control.store().calls().remember_calls().await {
        // Every call is looked up on disk then, as before this.
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "cannot list the recorded calls"
        );
    }
    let mut period = FIRST_REMOVAL;
    while wait(&cancel, period).await {
        period = LONG_PERIOD;
        remove_old(&control).await;
    }
}

async fn wait(cancel: &CancellationToken, period: Duration) -> bool {
    tokio::select! {
        () = cancel.cancelled() => false,
        () = tokio::time::sleep(period) => true,
    }
}

/// A failed sweep is tried again with the next one.
fn report(what: &str, result: Result<()>) {
    if let Err(error) = result {
        tracing::error!(error = &error as &dyn std::error::Error, "{what}");
    }
}

async fn note_consumed(control: &Control) -> Result<()> {
    for call_id in control.consumed().take() {
        control.turn().tell(Event::CallConsumed { call_id }).await?;
    }
    Ok(())
}

async fn remove_old(control: &Control) {
    report("old calls could not be removed", remove_calls(control).await);
    report("old containers could not be removed", remove_containers(control).await);
    match control.blobs().sweep(UPLOAD_RETENTION).await {
        Ok(swept) if swept.expired + swept.completed + swept.failed > 0 => {
            tracing::info!(
                expired = swept.expired,
                completed = swept.completed,
                failed = swept.failed,
                "uploads swept"
            );
        }
        Ok(_nothing) => {}
        Err(error) => {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "unfinished uploads could not be removed"
            );
        }
    }
    control.logs().sweep().await;
    let dir = control.builds().dir().to_owned();
    if let Err(error) = tokio::task::spawn_blocking(move || Builds::sweep(&dir, logs::RETENTION)).await {
        tracing::error!(%error, "old build logs could not be removed");
    }
}

async fn remove_calls(control: &Control) -> Result<()> {
    let now = Timestamp::now();
    let expiry = Expiry {
        finished_before: now - RESULT_RETENTION,
        consumed_before: now - CONSUMED_RETENTION,
    };
    let mut removed = 0;
    loop {
        let batch = control.store().calls().delete_expired(expiry, BATCH).await?.len();
        removed += batch;
        if batch < BATCH as usize {
            break;
        }
    }
    if removed > 0 {
        tracing::info!(calls = removed, "expired calls removed");
    }
    Ok(())
}

/// Rows of ended containers are kept for as long as their logs, which are found through them.
async fn remove_containers(control: &Control) -> Result<()> {
    let before = Timestamp::now() - logs::RETENTION;
    while control.store().containers().sweep(before, BATCH).await? >= u64::from(BATCH) {}
    Ok(())
}
