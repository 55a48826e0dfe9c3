//! A [`StepRunner`] for tests: `unshare`, overlayfs and `chroot`. It isolates nothing on purpose; what it
//! runs are the fixed commands of the tests.
#![allow(dead_code, reason = "each test file uses a part of this")]
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "test code, which clippy does not see as such"
)]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use ionian_domain::image::BuiltImage;
use ionian_image::{BuildLog, LayerStore, LogStream, MountedRoot, StepError, StepExecution, StepExit, StepRunner};
use tokio::io::{AsyncReadExt, BufReader};
use tokio_util::sync::CancellationToken;

const HOST_CA: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Mounts, binds and enters; everything goes with the mount namespace. `$1` is the mount point, `$2` the
/// options of the overlay, `$3` the working directory; then pairs of binds up to `--`, then the command.
const ENTER: &str = r#"
root=$1; mount -t overlay overlay -o "$2" "$root"; workdir=$3; shift 3
mount -t proc proc "$root/proc"; mount --rbind /dev "$root/dev"
touch "$root/etc/resolv.conf"; mount --bind /etc/resolv.conf "$root/etc/resolv.conf"
if [ -s /etc/ssl/certs/ca-certificates.crt ]; then
  mkdir -p "$root/etc/ssl/certs"; touch "$root/etc/ssl/certs/ca-certificates.crt"
  mount --bind /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
fi
while [ "$1" != -- ]; do
  if [ -d "$1" ]; then mkdir -p "$root$2"; else mkdir -p "$(dirname "$root$2")"; touch "$root$2"; fi
  mount --bind "$1" "$root$2"; shift 2
done
shift
exec chroot "$root" /bin/sh -c 'cd "$0" && exec "$@"' "$workdir" "$@"
"#;

pub(crate) struct ChrootRunner;

#[async_trait]
impl StepRunner for ChrootRunner {
    async fn run(&self, step: StepExecution, log: &BuildLog) -> Result<StepExit, StepError> {
        let failed = |error: std::io::Error| StepError::runtime("run a test step", error);
        let root = tempfile::tempdir().map_err(failed)?;
        let lowers: Vec<String> = step
            .lower_dirs
            .iter()
            .rev()
            .map(|dir| dir.display().to_string())
            .collect();
        let (upper, work) = (step.upper_dir.display(), step.work_dir.display());
        let options = format!("lowerdir={},upperdir={upper},workdir={work}", lowers.join(":"));
        let mut command = tokio::process::Command::new("unshare");
        command.args([
            "--mount",
            "--propagation",
            "private",
            "--pid",
            "--fork",
            "--kill-child",
            "sh",
            "-ec",
            ENTER,
            "sh",
        ]);
        command.arg(root.path()).arg(options).arg(&step.workdir);
        for bind in &step.binds {
            command.arg(&bind.source).arg(&bind.target);
        }
        command
            .arg("--")
            .args(&step.argv)
            .env_clear()
            .envs(step.env.iter().cloned());
        for name in ["SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE"] {
            command.env(name, HOST_CA);
        }
        if !step.env.iter().any(|(name, _)| name == "PATH") {
            command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(failed)?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let run = async {
            tokio::join!(
                copy(stdout, LogStream::Stdout, log),
                copy(stderr, LogStream::Stderr, log)
            );
            child.wait().await
        };
        match tokio::time::timeout(step.timeout, run).await {
            Err(_) => Ok(StepExit::TimedOut),
            Ok(status) => Ok(StepExit::Exited(status.map_err(failed)?.code().unwrap_or(-1))),
        }
    }

    async fn mount(
        &self,
        _lower_dirs: &[PathBuf],
        _upper: Option<(&Path, &Path)>,
    ) -> Result<Box<dyn MountedRoot>, StepError> {
        Err(StepError::runtime("mount layers", "the test runner only runs"))
    }
}

async fn copy(stream: Option<impl tokio::io::AsyncRead + Unpin>, kind: LogStream, log: &BuildLog) {
    let Some(stream) = stream else { return };
    let mut reader = BufReader::new(stream);
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(count) = reader.read(&mut buffer).await {
        if count == 0 {
            return;
        }
        log.chunk(kind, Bytes::copy_from_slice(&buffer[..count])).await;
    }
}

/// A build log whose text can be looked at; with `IONIAN_TEST_SHOW_LOG` it is printed too.
#[derive(Clone, Default)]
pub(crate) struct RecordedLog {
    text: Arc<Mutex<String>>,
}

impl RecordedLog {
    pub(crate) fn start() -> (Self, BuildLog) {
        let (log, mut rx) = BuildLog::channel();
        let recorded = Self::default();
        let text = recorded.text.clone();
        let show = std::env::var_os("IONIAN_TEST_SHOW_LOG").is_some();
        std::thread::spawn(move || {
            while let Some(chunk) = rx.blocking_recv() {
                let piece = String::from_utf8_lossy(&chunk.bytes).into_owned();
                if show {
                    print!("{piece}");
                }
                text.lock().unwrap().push_str(&piece);
            }
        });
        (recorded, log)
    }

    /// Waits for the log to contain a text: it is written by another thread.
    pub(crate) fn expect(&self, wanted: &str) {
        for _ in 0..200 {
            if self.text.lock().unwrap().contains(wanted) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("the log does not say {wanted:?}:\n{}", self.text());
    }

    pub(crate) fn text(&self) -> String {
        self.text.lock().unwrap().clone()
    }
}

/// Runs a shell command upon an image and, above it, the given directories (base first), in a new one.
pub(crate) async fn shell(
    image: &BuiltImage,
    layers: &LayerStore,
    uppers: &mut Vec<PathBuf>,
    scratch: &Path,
    command: &str,
    log: &BuildLog,
) -> StepExit {
    let number = uppers.len();
    let (upper_dir, work_dir) = (scratch.join(format!("u{number}")), scratch.join(format!("w{number}")));
    for dir in [&upper_dir, &work_dir] {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut lower_dirs: Vec<PathBuf> = image.layers.iter().map(|key| layers.fs_path(key)).collect();
    lower_dirs.extend(uppers.iter().cloned());
    let step = StepExecution {
        lower_dirs,
        upper_dir: upper_dir.clone(),
        work_dir,
        argv: ["/bin/sh", "-c", command].map(str::to_owned).to_vec(),
        env: image.config.env.clone(),
        workdir: "/".to_owned(),
        user: None,
        binds: Vec::new(),
        has_network: true,
        gpu: None,
        timeout: std::time::Duration::from_mins(15),
        cancel: CancellationToken::new(),
    };
    let exit = ChrootRunner.run(step, log).await.unwrap();
    uppers.push(upper_dir);
    exit
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
