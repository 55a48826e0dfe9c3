//! Running a system program for a bounded time.

use std::ffi::OsStr;
use std::io;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// `nft` takes milliseconds; a busy machine may take a thousand times that.
const TIMEOUT: Duration = Duration::from_secs(15);

#[derive(Debug, thiserror::Error)]
pub(crate) enum CommandError {
    #[error("failed to run {program}")]
    Spawn { program: String, source: io::Error },
    #[error("{program} did not end within {} s", TIMEOUT.as_secs())]
    TimedOut { program: String },
    #[error("{program} failed ({status}): {stderr}")]
    Failed {
        program: String,
        status: std::process::ExitStatus,
        stderr: String,
    },
}

pub(crate) enum Input<'a> {
    None,
    Text(&'a str),
}

/// Runs to the end and returns what was printed; killed when it takes too long or the future is dropped.
pub(crate) async fn run(
    program: &str,
    arguments: &[impl AsRef<OsStr>],
    input: Input<'_>,
) -> Result<String, CommandError> {
    let spawn_failed = |source| CommandError::Spawn {
        program: program.to_owned(),
        source,
    };
    let stdin = match input {
        Input::None => Stdio::null(),
        Input::Text(_) => Stdio::piped(),
    };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(spawn_failed)?;
    let finish = async {
        if let (Input::Text(text), Some(mut stdin)) = (&input, child.stdin.take()) {
            // A program that refuses its input early closes it; its exit status says why.
            match stdin.write_all(text.as_bytes()).await {
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
                _ => drop(stdin),
            }
        }
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(TIMEOUT, finish)
        .await
        .map_err(|_| CommandError::TimedOut {
            program: program.to_owned(),
        })?
        .map_err(spawn_failed)?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(CommandError::Failed {
            program: program.to_owned(),
            status: output.status,
            stderr,
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
