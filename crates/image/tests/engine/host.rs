//! A runner for tests: overlay mounts and chroot, without any isolation. And a base image with a shell,
//! taken from the host.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use ionian_domain::image::{BuiltImage, ImageSpec, RegistryAuth};
use ionian_image::base::{BaseConfig, BaseImages};
use ionian_image::{
    Begin, BuildError, BuildLog, BuildRequest, BuilderConfig, ContextEntry, HostTrust, ImageBuilder, LayerNote,
    LayerStore, LogStream, MountedRoot, StepError, StepExecution, StepExit, StepRunner, layer_key,
};
use tokio::io::AsyncReadExt;
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

/// Programs of the base image.
const PROGRAMS: [&str; 14] = [
    "sh", "cat", "echo", "mkdir", "rm", "ln", "ls", "sleep", "chmod", "env", "touch", "stat", "id", "test",
];

pub(crate) struct ChrootRunner {
    mounts: PathBuf,
    /// What was run, in order, without the inspections.
    pub(crate) ran: Mutex<Vec<String>>,
}

struct Mounted {
    path: PathBuf,
}

impl MountedRoot for Mounted {
    fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Never lazily: a view that stays in use is a mistake of the engine. A killed process takes a
        // moment to let go of it.
        for _ in 0..100 {
            let output = std::process::Command::new("umount")
                .arg("--recursive")
                .arg(&self.path)
                .output()
                .unwrap();
            if output.status.success() {
                fs::remove_dir(&self.path).unwrap();
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("failed to unmount {}", self.path.display());
    }
}

/// Ends a command and what it started, however the step ends.
struct Group(rustix::process::Pid);

impl Drop for Group {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = rustix::process::kill_process_group(self.0, rustix::process::Signal::KILL);
    }
}

fn mount(arguments: &[&OsStr]) -> Result<(), StepError> {
    let output = std::process::Command::new("mount").args(arguments).output().unwrap();
    if output.status.success() {
        return Ok(());
    }
    Err(StepError::runtime(
        "mount",
        String::from_utf8_lossy(&output.stderr).into_owned(),
    ))
}

impl ChrootRunner {
    fn mount_view(&self, lower_dirs: &[PathBuf], upper: Option<(&Path, &Path)>) -> Result<Mounted, StepError> {
        let dir = tempfile::tempdir_in(&self.mounts).unwrap().keep();
        let lowers: Vec<String> = lower_dirs.iter().rev().map(|dir| dir.display().to_string()).collect();
        match (lowers.as_slice(), upper) {
            ([], None) => panic!("nothing to mount"),
            ([], Some((upper, _))) => mount(&[OsStr::new("--bind"), upper.as_os_str(), dir.as_os_str()])?,
            ([only], None) => mount(&[
                "--bind".as_ref(),
                "-o".as_ref(),
                "ro".as_ref(),
                OsStr::new(only),
                dir.as_os_str(),
            ])?,
            (several, upper) => {
                let mut options = format!("lowerdir={}", several.join(":"));
                if let Some((upper, work)) = upper {
                    options = format!("{options},upperdir={},workdir={}", upper.display(), work.display());
                }
                mount(
                    &["-t", "overlay", "overlay", "-o", &options]
                        .map(OsStr::new)
                        .into_iter()
                        .chain([dir.as_os_str()])
                        .collect::<Vec<_>>(),
                )?;
            }
        }
        Ok(Mounted { path: dir })
    }
}

#[async_trait]
impl StepRunner for ChrootRunner {
    async fn run(&self, step: StepExecution, log: &BuildLog) -> Result<StepExit, StepError> {
        if !step.argv.iter().any(|argument| argument.contains("ionian-inspection")) {
            self.ran
                .lock()
                .unwrap()
                .push(step.argv.last().cloned().unwrap_or_default());
        }
        let view = self.mount_view(&step.lower_dirs, Some((&step.upper_dir, &step.work_dir)))?;
        for bind in &step.binds {
            let target = view.path.join(bind.target.trim_start_matches('/'));
            if bind.source.is_dir() {
                fs::create_dir_all(&target).unwrap();
            } else {
                fs::create_dir_all(target.parent().unwrap()).unwrap();
                fs::OpenOptions::new().append(true).create(true).open(&target).unwrap();
            }
            mount(&[OsStr::new("--bind"), bind.source.as_os_str(), target.as_os_str()])?;
        }
        let mut command = Command::new("chroot");
        command
            .arg(&view.path)
            .args(["/usr/bin/env", "-C", &step.workdir])
            .args(&step.argv);
        command
            .env_clear()
            .envs(step.env.iter().cloned())
            .process_group(0)
            .kill_on_drop(true);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let group = Group(rustix::process::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap());
        let (mut stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let end = async move {
            tokio::select! {
                status = child.wait() => {
                    let status = status.unwrap();
                    Ok(status.code().map_or(StepExit::Signaled(9), StepExit::Exited))
                }
                () = tokio::time::sleep(step.timeout) => {
                    drop(group);
                    child.wait().await.unwrap();
                    Ok(StepExit::TimedOut)
                }
                () = step.cancel.cancelled() => {
                    drop(group);
                    child.wait().await.unwrap();
                    Err(StepError::Cancelled)
                }
            }
        };
        let (exit, (), ()) = tokio::join!(
            end,
            pump(&mut stdout, LogStream::Stdout, log),
            pump(&mut stderr, LogStream::Stderr, log)
        );
        exit
    }

    async fn mount(
        &self,
        lower_dirs: &[PathBuf],
        upper: Option<(&Path, &Path)>,
    ) -> Result<Box<dyn MountedRoot>, StepError> {
        Ok(Box::new(self.mount_view(lower_dirs, upper)?))
    }
}

async fn pump(pipe: &mut (impl AsyncReadExt + Unpin), stream: LogStream, log: &BuildLog) {
    let mut buffer = vec![0; 4096];
    loop {
        let count = pipe.read(&mut buffer).await.unwrap();
        if count == 0 {
            return;
        }
        log.chunk(stream, Bytes::copy_from_slice(&buffer[..count])).await;
    }
}

/// Everything that a test needs, in one directory that goes away with it.
pub(crate) struct Host {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) layers: LayerStore,
    pub(crate) runner: Arc<ChrootRunner>,
    pub(crate) builder: ImageBuilder,
    pub(crate) base: BuiltImage,
}

impl Host {
    /// `None`, and a printed line, where the test cannot run.
    pub(crate) async fn new() -> Option<Self> {
        Self::with(HostTrust::default(), Duration::from_mins(1)).await
    }

    pub(crate) async fn with(trust: HostTrust, step_timeout: Duration) -> Option<Self> {
        if !rustix::process::getuid().is_root() {
            println!("skipped: overlay mounts and chroot need root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        for name in ["mounts", "content", "cache", "scratch"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let layers = LayerStore::open(dir.path().join("layers")).unwrap();
        let runner = Arc::new(ChrootRunner {
            mounts: dir.path().join("mounts"),
            ran: Mutex::default(),
        });
        let mut base_config = BaseConfig::new(dir.path().join("scratch"));
        base_config.sources = Vec::new();
        let content = dir.path().join("content");
        let builder = ImageBuilder::new(BuilderConfig {
            layers: layers.clone(),
            base_images: Arc::new(BaseImages::new(base_config).unwrap()),
            runner: runner.clone(),
            files: Arc::new(move |digest| Ok(content.join(digest))),
            trust,
            step_timeout,
            cache_dir: dir.path().join("cache"),
            scratch_dir: dir.path().join("scratch"),
            volatile_dir: "/dev/shm".into(),
        });
        let base = base_image(&layers).await;
        Some(Self {
            dir,
            layers,
            runner,
            builder,
            base,
        })
    }

    /// A request upon the base image.
    pub(crate) fn request(&self, commands: &[&str]) -> BuildRequest {
        BuildRequest {
            spec: ImageSpec {
                base_images: Vec::new(),
                dockerfile_commands: commands.iter().map(|command| (*command).to_owned()).collect(),
                context_files: Vec::new(),
                context_mount_id: None,
                secret_ids: Vec::new(),
                build_args: BTreeMap::new(),
                registry_auth: RegistryAuth::Public,
                gpu: None,
                build_function_id: None,
                builder_version: "2025.06".to_owned(),
            },
            bases: [("base".to_owned(), self.base.clone())].into(),
            context: Vec::new(),
            secrets: Vec::new(),
            registry_auth: None,
            force: false,
        }
    }

    pub(crate) fn context(&self, path: &str, content: &[u8], mode: Option<u32>) -> ContextEntry {
        let sha256_hex = layer_key(&[content]);
        fs::write(self.dir.path().join("content").join(&sha256_hex), content).unwrap();
        ContextEntry {
            path: path.to_owned(),
            sha256_hex,
            mode,
        }
    }

    pub(crate) async fn build(&self, request: BuildRequest) -> (Result<BuiltImage, BuildError>, String) {
        self.build_until(request, CancellationToken::new()).await
    }

    pub(crate) async fn build_until(
        &self,
        request: BuildRequest,
        cancel: CancellationToken,
    ) -> (Result<BuiltImage, BuildError>, String) {
        let (log, mut chunks) = BuildLog::channel();
        let read = async {
            let mut text = Vec::new();
            while let Some(chunk) = chunks.recv().await {
                text.extend_from_slice(&chunk.bytes);
            }
            String::from_utf8_lossy(&text).into_owned()
        };
        tokio::join!(self.builder.build(request, log, cancel), read)
    }

    pub(crate) async fn built(&self, commands: &[&str]) -> BuiltImage {
        let (result, log) = self.build(self.request(commands)).await;
        result.unwrap_or_else(|error| panic!("{error}\n{log}"))
    }

    /// The files of an image, mounted as a container would see them.
    pub(crate) fn view(&self, image: &BuiltImage) -> impl MountedRoot + use<> {
        let dirs: Vec<PathBuf> = image.layers.iter().map(|key| self.layers.fs_path(key)).collect();
        self.runner.mount_view(&dirs, None).unwrap()
    }

    /// What a command in the image prints.
    pub(crate) fn read(&self, image: &BuiltImage, path: &str) -> String {
        fs::read_to_string(self.view(image).path().join(path)).unwrap()
    }

    pub(crate) fn ran(&self) -> Vec<String> {
        std::mem::take(&mut self.runner.ran.lock().unwrap())
    }

    /// Whether any file that the test left on the disk holds these bytes.
    pub(crate) fn holds(&self, needle: &[u8]) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut waiting = vec![self.dir.path().to_owned()];
        while let Some(dir) = waiting.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let metadata = fs::symlink_metadata(&path).unwrap();
                if metadata.is_dir() {
                    waiting.push(path);
                } else if metadata.is_file()
                    && fs::read(&path)
                        .unwrap()
                        .windows(needle.len())
                        .any(|window| window == needle)
                {
                    found.push(path);
                }
            }
        }
        found
    }
}

/// A shell and a few programs with the libraries they need, and a Python that answers as one would.
async fn base_image(layers: &LayerStore) -> BuiltImage {
    let key = layer_key(&["test base"]);
    if let Begin::Build(draft) = layers.begin(&key).await.unwrap() {
        let root = draft.fs().to_owned();
        for dir in [
            "usr/bin",
            "usr/local/bin",
            "usr/lib",
            "usr/lib64",
            "etc",
            "tmp",
            "proc",
            "dev",
            "root",
        ] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        for name in ["bin", "lib", "lib64"] {
            std::os::unix::fs::symlink(format!("usr/{name}"), root.join(name)).unwrap();
        }
        std::os::unix::fs::symlink("../usr/lib", root.join("etc/lib-link")).unwrap();
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\napp:x:1234:1235::/:/bin/sh\n",
        )
        .unwrap();
        fs::write(root.join("etc/group"), "root:x:0:\nstaff:x:50:\n").unwrap();
        for program in PROGRAMS {
            let source = Path::new("/usr/bin").join(program);
            fs::copy(&source, root.join("usr/bin").join(program)).unwrap();
            let output = std::process::Command::new("ldd").arg(&source).output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            for library in text.split_whitespace().filter(|word| word.starts_with('/')) {
                let target = root.join(library.trim_start_matches('/'));
                fs::create_dir_all(target.parent().unwrap()).unwrap();
                fs::copy(library, target).unwrap();
            }
        }
        let python = root.join("usr/local/bin/python");
        fs::write(
            &python,
            "#!/bin/sh\necho 'ionian-inspection:{\"version\":\"3.11.2 (main)\",\"libc\":\"glibc 2.36\",\"path\":[\"\",\"/site\"]}'\n",
        )
        .unwrap();
        fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).unwrap();
        draft
            .commit(LayerNote {
                made_by: "test base".to_owned(),
                parent: None,
            })
            .await
            .unwrap();
    }
    BuiltImage {
        layers: vec![key],
        ..BuiltImage::default()
    }
}
