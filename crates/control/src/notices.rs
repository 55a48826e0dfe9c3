//! What the platform itself says in apps' logs: about their functions, and about requests that were served.

use ionian_domain::log::{LogEntry, LogStream};
use ionian_domain::{ContainerId, Timestamp};
use tokio::sync::mpsc;

use crate::Control;
use crate::effects::Notice;
use crate::error::Error;
use crate::web::ServedRequest;

/// How far back a function's newest container is looked for.
const NEWEST_CONTAINERS: u32 = 100;

/// What the platform says about a function, in its app's log.
pub(crate) async fn write(control: Control, mut notices: mpsc::Receiver<Notice>) {
    while let Some(notice) = notices.recv().await {
        tracing::info!(function = %notice.function_id, text = notice.text.trim_end(), "notice");
        if let Err(error) = write_notice(&control, &notice).await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "a notice could not be written to its app's log"
            );
        }
    }
}

/// An entry belongs to a container: to the newest one of the function, which the notice is about; or to one that
/// never came to be, where the notice says why.
async fn write_notice(control: &Control, notice: &Notice) -> Result<(), Error> {
    let app_id = control.functions().get(notice.function_id).await?.app_id;
    let newest = control
        .store()
        .containers()
        .list_by_app(app_id, NEWEST_CONTAINERS)
        .await?;
    let container_id = newest
        .into_iter()
        .find(|container| container.function_id == notice.function_id)
        .map_or_else(ContainerId::generate, |container| container.id);
    let entry = LogEntry {
        at: Timestamp::now(),
        app_id,
        function_id: notice.function_id,
        container_id,
        stream: LogStream::Info,
        text: notice.text.clone(),
    };
    control.logs().append(vec![entry]).await;
    Ok(())
}

/// Requests in one write to the log.
const SERVED_PER_WRITE: usize = 64;

pub(crate) async fn write_requests(control: Control, mut served: mpsc::Receiver<ServedRequest>) {
    let mut batch = Vec::with_capacity(SERVED_PER_WRITE);
    while served.recv_many(&mut batch, SERVED_PER_WRITE).await > 0 {
        let entries = batch
            .drain(..)
            .map(|request| {
                let left_out = match request.left_out {
                    0 => String::new(),
                    count => format!("  (and {count} more requests that are not shown)"),
                };
                LogEntry {
                    at: Timestamp::now(),
                    app_id: request.app_id,
                    function_id: request.function_id,
                    container_id: request.container_id,
                    stream: LogStream::Info,
                    text: format!(
                        "{} {} -> {}  (duration: {:.1} ms){left_out}\n",
                        request.method,
                        request.path,
                        request.status,
                        request.duration.as_secs_f64() * 1e3,
                    ),
                }
            })
            .collect();
        control.logs().append(entries).await;
    }
}
