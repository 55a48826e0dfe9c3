//! What a container finds when it starts: command, environment, directory, binds and limits. Pure.
//!
//! In a container with an image of its own:
//!
//! | where | what |
//! |---|---|
//! | `/pkg` | the official client, first on `PYTHONPATH` after `/root`; its `sitecustomize` appends the next two |
//! | `/__modal/deps` | the client's dependencies, for images that have none |
//! | `/__ionian/deps` | what the web hook imports |
//! | `/__ionian/hook` | the launcher and the web hook |
//! | `/__ionian/run/arguments.bin` | the official runtime's arguments |
//! | `/__ionian/ca-certificates.crt` | the host's CA bundle, if it is shared |
//!
//! The environment, weakest first: the image's; the host's trust settings, where neither image nor user set
//! them; the user's secrets in their order; the platform's.

use std::path::{Path, PathBuf};

use ionian_container::{Bind, Launch, Limits, NetworkMode, Rootfs};
use ionian_domain::ContainerId;
use ionian_domain::container::{ContainerSpec, WebHookMode};
use ionian_image::HostTrust;
use ionian_image::client_bundle::ClientBundle;

use crate::hook;

pub(crate) const PKG_TARGET: &str = "/pkg";
pub(crate) const DEPS_TARGET: &str = "/__modal/deps";
pub(crate) const EXTRA_TARGET: &str = "/__ionian/deps";
pub(crate) const HOOK_TARGET: &str = "/__ionian/hook";
pub(crate) const ARGUMENTS_TARGET: &str = "/__ionian/run/arguments.bin";
/// Where the client puts the files of functions, and where they run unless the image says otherwise.
const HOME: &str = "/root";
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Of the image's variables, those that say where things are in the image: meaningless without it.
const PLACES_IN_IMAGE: [&str; 5] = ["PATH", "HOME", "PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH"];

/// What every container gets that does not ask for something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DefaultLimits {
    pub(crate) memory_bytes: Option<u64>,
    pub(crate) pids: u32,
}

/// What was prepared for a container with an image.
pub(crate) struct Prepared<'a> {
    /// Layers of the image and of the function's files, base first.
    pub(crate) lower_dirs: Vec<PathBuf>,
    /// Absolute, in the image.
    pub(crate) python: String,
    pub(crate) bundle: &'a ClientBundle,
    pub(crate) hook_dir: &'a Path,
    pub(crate) arguments_file: &'a Path,
    pub(crate) trust: &'a HostTrust,
    pub(crate) limits: DefaultLimits,
}

/// What was prepared for a container that is a plain process of this host.
pub(crate) struct PreparedProcess<'a> {
    /// An interpreter of this host that has the client installed.
    pub(crate) python: &'a Path,
    /// The function's files, as they would lie below `/`.
    pub(crate) files_dir: &'a Path,
    pub(crate) hook_dir: &'a Path,
    pub(crate) arguments_file: &'a Path,
    pub(crate) trust_env: &'a [(String, String)],
    /// The worker's own `PATH`.
    pub(crate) host_path: &'a str,
}

/// The `PATH` by which a command of the container is found.
pub(crate) fn search_path(spec: &ContainerSpec) -> &str {
    let image = spec.image_config().env.iter();
    let found = image.chain(&spec.secret_env).rev().find(|(name, _)| name == "PATH");
    found.map_or(DEFAULT_PATH, |(_, value)| value.as_str())
}

pub(crate) fn isolated(id: ContainerId, spec: &ContainerSpec, prepared: Prepared<'_>) -> Launch {
    let config = spec.image_config();
    let mut env = Environment::default();
    env.extend(&config.env);
    let mut users_own = env.clone();
    users_own.extend(&spec.secret_env);
    env.extend(&prepared.trust.trust_env(&users_own.0));
    env.extend(&spec.secret_env);
    env.set_default("PATH", DEFAULT_PATH);
    env.set_python_path(&[HOME, PKG_TARGET]);
    set_platform(&mut env, spec, ARGUMENTS_TARGET, "0.0.0.0");
    env.set(
        "IONIAN_CLIENT_DEPS",
        if spec.mount_client_dependencies { "1" } else { "0" },
    );

    // An entrypoint is expected to `exec` its arguments; images are told so by the client's documentation.
    let mut argv = config.entrypoint.clone();
    argv.extend([
        prepared.python,
        "-u".to_owned(),
        format!("{HOOK_TARGET}/{}", hook::LAUNCHER),
    ]);

    let bind = |source: &Path, target: &str| Bind {
        source: source.to_owned(),
        target: target.to_owned(),
        read_only: true,
    };
    let mut binds = vec![bind(&prepared.bundle.pkg_dir, PKG_TARGET)];
    if spec.mount_client_dependencies {
        binds.push(bind(&prepared.bundle.deps_dir, DEPS_TARGET));
    }
    binds.push(bind(&prepared.bundle.extra_dir, EXTRA_TARGET));
    binds.push(bind(prepared.hook_dir, HOOK_TARGET));
    binds.push(bind(prepared.arguments_file, ARGUMENTS_TARGET));
    binds.extend(prepared.trust.binds().into_iter().map(|step| Bind {
        source: step.source,
        target: step.target,
        read_only: step.read_only,
    }));

    let mut launch = Launch::new(id.to_string(), Rootfs::scratch(prepared.lower_dirs), argv);
    launch.env = env.0;
    // The next process of this worker adopts it, or removes it.
    launch.outlives_us = true;
    launch.workdir = config
        .workdir
        .clone()
        .filter(|path| path.starts_with('/'))
        .unwrap_or_else(|| HOME.to_owned());
    launch.user = config.user.clone().filter(|user| !user.is_empty());
    launch.binds = binds;
    launch.limits = limits(spec, prepared.limits);
    launch.network = NetworkMode::Bridge;
    launch.egress = spec.egress.clone();
    launch
}

/// A request (`cpu`, `memory`) is what the container is placed by and no limit; only a limit limits.
fn limits(spec: &ContainerSpec, defaults: DefaultLimits) -> Limits {
    let asked = spec.resources.memory_limit_mib.map(|mib| u64::from(mib) << 20);
    Limits {
        memory_bytes: match (asked, defaults.memory_bytes) {
            (Some(asked), Some(ceiling)) => Some(asked.min(ceiling)),
            (asked, ceiling) => asked.or(ceiling),
        },
        cpu_millis: spec.resources.cpu_limit_millis,
        pids: Some(defaults.pids),
    }
}

/// Without an image and without isolation: what the runtime cannot give is not asked for.
pub(crate) fn process(id: ContainerId, spec: &ContainerSpec, prepared: &PreparedProcess<'_>) -> Launch {
    let home = prepared.files_dir.join(HOME.trim_start_matches('/'));
    let home = home.display().to_string();
    let mut env = Environment::default();
    env.extend(
        spec.image_config()
            .env
            .iter()
            .filter(|(name, _)| !PLACES_IN_IMAGE.contains(&name.as_str())),
    );
    env.extend(prepared.trust_env);
    env.extend(&spec.secret_env);
    env.set_default("PATH", prepared.host_path);
    env.set_default("HOME", &home);
    env.set_python_path(&[&home]);
    set_platform(
        &mut env,
        spec,
        &prepared.arguments_file.display().to_string(),
        "127.0.0.1",
    );
    env.set("IONIAN_CLIENT_DEPS", "0");
    let launcher = prepared.hook_dir.join(hook::LAUNCHER).display().to_string();
    let argv = vec![prepared.python.display().to_string(), "-u".to_owned(), launcher];
    let mut launch = Launch::new(id.to_string(), Rootfs::host(), argv);
    launch.env = env.0;
    launch.workdir = home;
    launch.network = NetworkMode::Host;
    // Refused by the runtime, rather than left out.
    launch.egress = spec.egress.clone();
    launch
}

/// What nobody may override, after everything else.
fn set_platform(env: &mut Environment, spec: &ContainerSpec, arguments: &str, web_bind: &str) {
    env.set_default("PYTHONUNBUFFERED", "1");
    env.extend(&spec.platform_env);
    env.set("MODAL_CONTAINER_ARGUMENTS_PATH", arguments);
    env.set("IONIAN_WEB_BIND", web_bind);
    let hook = match spec.web_hook {
        WebHookMode::On => "1",
        WebHookMode::Off => "0",
    };
    env.set("IONIAN_WEB_HOOK", hook);
}

/// Variables in the order in which they were first set.
#[derive(Debug, Clone, Default)]
struct Environment(Vec<(String, String)>);

impl Environment {
    fn set(&mut self, name: &str, value: impl Into<String>) {
        match self.0.iter_mut().find(|(known, _)| known == name) {
            Some((_, known)) => *known = value.into(),
            None => self.0.push((name.to_owned(), value.into())),
        }
    }

    fn set_default(&mut self, name: &str, value: &str) {
        if self.get(name).is_none() {
            self.set(name, value);
        }
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }

    fn extend<'a, Pair: PairOfText<'a>>(&mut self, pairs: impl IntoIterator<Item = Pair>) {
        for pair in pairs {
            let (name, value) = pair.pair();
            self.set(name, value);
        }
    }

    /// The platform's entries first, then what is there.
    fn set_python_path(&mut self, first: &[&str]) {
        let mut entries = first.to_vec();
        let existing = self.get("PYTHONPATH").unwrap_or_default().to_owned();
        entries.extend(existing.split(':').filter(|entry| !entry.is_empty()));
        self.set("PYTHONPATH", entries.join(":"));
    }
}

/// A pair by reference, from a list or from a map.
trait PairOfText<'a> {
    fn pair(self) -> (&'a str, &'a str);
}

impl<'a> PairOfText<'a> for &'a (String, String) {
    fn pair(self) -> (&'a str, &'a str) {
        (&self.0, &self.1)
    }
}

impl<'a> PairOfText<'a> for (&'a String, &'a String) {
    fn pair(self) -> (&'a str, &'a str) {
        (self.0, self.1)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;
    use std::fmt::Write;
    use std::sync::Arc;

    use expect_test::{Expect, expect};
    use ionian_domain::container::RuntimeKind;
    use ionian_domain::function::Resources;
    use ionian_domain::image::{BuiltImage, ImageConfig, ImageMetadata};
    use ionian_domain::network::Egress;
    use ionian_domain::{AppId, FunctionId, ImageId};

    use super::*;

    fn pair(name: &str, value: &str) -> (String, String) {
        (name.to_owned(), value.to_owned())
    }

    /// A plain function of an image with nothing special.
    pub(crate) fn spec() -> ContainerSpec {
        let config = ImageConfig {
            env: vec![pair("PATH", "/usr/local/bin:/usr/bin")],
            ..ImageConfig::default()
        };
        let image = BuiltImage {
            layers: vec!["base".to_owned()],
            config,
            metadata: ImageMetadata::default(),
        };
        ContainerSpec {
            app_id: AppId::generate(),
            function_id: FunctionId::generate(),
            function_name: "f".to_owned(),
            runtime: RuntimeKind::Runc,
            image_id: ImageId::generate(),
            image: Arc::new(image),
            files: Vec::new(),
            volumes: Vec::new(),
            resources: Resources::default(),
            secret_env: Vec::new(),
            platform_env: BTreeMap::from([pair("MODAL_IS_REMOTE", "1"), pair("MODAL_TASK_ID", "ta-1")]),
            arguments: bytes::Bytes::from_static(b"arguments"),
            client_version: "1.6.4".to_owned(),
            mount_client_dependencies: true,
            web_hook: WebHookMode::On,
            egress: Egress::Open,
        }
    }

    fn check(spec: &ContainerSpec, expected: &Expect) {
        let bundle = ClientBundle {
            pkg_dir: "/b/pkg".into(),
            deps_dir: "/b/deps".into(),
            extra_dir: "/b/extra".into(),
        };
        let trust = HostTrust {
            ca_bundle: Some("/host.crt".into()),
            env: vec![pair("PIP_INDEX_URL", "https://index")],
        };
        let prepared = Prepared {
            lower_dirs: vec!["/layers/base".into(), "/mounts/m".into()],
            python: "/usr/local/bin/python".to_owned(),
            bundle: &bundle,
            hook_dir: Path::new("/state/hook"),
            arguments_file: Path::new("/state/run/arguments.bin"),
            trust: &trust,
            limits: DefaultLimits {
                memory_bytes: Some(8 << 30),
                pids: 4096,
            },
        };
        expected.assert_eq(&show(&isolated(ContainerId::generate(), spec, prepared)));
    }

    fn show(launch: &Launch) -> String {
        let mut text = String::new();
        writeln!(
            text,
            "{} in {} as {}",
            launch.argv.join(" "),
            launch.workdir,
            launch.user.as_deref().unwrap_or("root")
        )
        .unwrap();
        for (name, value) in &launch.env {
            writeln!(text, "  {name}={value}").unwrap();
        }
        for bind in &launch.binds {
            let mode = if bind.read_only { "ro" } else { "rw" };
            writeln!(text, "{} -> {} {mode}", bind.source.display(), bind.target).unwrap();
        }
        writeln!(text, "{:?} {:?} {:?}", launch.limits, launch.network, launch.egress).unwrap();
        text
    }

    #[test]
    fn a_plain_function() {
        check(
            &spec(),
            &expect![[r"
            /usr/local/bin/python -u /__ionian/hook/ionian_container/launcher.py in /root as root
              PATH=/usr/local/bin:/usr/bin
              PIP_INDEX_URL=https://index
              SSL_CERT_FILE=/__ionian/ca-certificates.crt
              REQUESTS_CA_BUNDLE=/__ionian/ca-certificates.crt
              PIP_CERT=/__ionian/ca-certificates.crt
              CURL_CA_BUNDLE=/__ionian/ca-certificates.crt
              NODE_EXTRA_CA_CERTS=/__ionian/ca-certificates.crt
              GIT_SSL_CAINFO=/__ionian/ca-certificates.crt
              AWS_CA_BUNDLE=/__ionian/ca-certificates.crt
              CARGO_HTTP_CAINFO=/__ionian/ca-certificates.crt
              PYTHONPATH=/root:/pkg
              PYTHONUNBUFFERED=1
              MODAL_IS_REMOTE=1
              MODAL_TASK_ID=ta-1
              MODAL_CONTAINER_ARGUMENTS_PATH=/__ionian/run/arguments.bin
              IONIAN_WEB_BIND=0.0.0.0
              IONIAN_WEB_HOOK=1
              IONIAN_CLIENT_DEPS=1
            /b/pkg -> /pkg ro
            /b/deps -> /__modal/deps ro
            /b/extra -> /__ionian/deps ro
            /state/hook -> /__ionian/hook ro
            /state/run/arguments.bin -> /__ionian/run/arguments.bin ro
            /host.crt -> /__ionian/ca-certificates.crt ro
            Limits { memory_bytes: Some(8589934592), cpu_millis: None, pids: Some(4096) } Bridge Open
        "]],
        );
    }

    #[test]
    fn who_wins() {
        let mut spec = spec();
        spec.web_hook = WebHookMode::Off;
        spec.mount_client_dependencies = false;
        let image = Arc::make_mut(&mut spec.image);
        image.config.env.extend([
            pair("PYTHONPATH", "/srv/lib"),
            pair("A", "image"),
            pair("PIP_INDEX_URL", "https://image"),
            pair("HOME", "/home/app"),
        ]);
        image.config.workdir = Some("/srv".to_owned());
        image.config.user = Some("app".to_owned());
        image.config.entrypoint = vec!["/entry.sh".to_owned(), "--".to_owned()];
        spec.secret_env = vec![
            pair("A", "first secret"),
            pair("A", "second secret"),
            pair("SSL_CERT_FILE", "/mine.crt"),
            pair("MODAL_TASK_ID", "forged"),
            pair("IONIAN_WEB_HOOK", "forged"),
            pair("PYTHONUNBUFFERED", "0"),
        ];
        spec.resources.memory_mib = Some(128);
        spec.resources.memory_limit_mib = Some(256);
        spec.resources.cpu_millis = Some(2000);
        spec.resources.cpu_limit_millis = Some(500);
        spec.egress = Egress::Allow(vec!["10.0.0.0/8".parse().unwrap()]);
        check(
            &spec,
            &expect![[r"
            /entry.sh -- /usr/local/bin/python -u /__ionian/hook/ionian_container/launcher.py in /srv as app
              PATH=/usr/local/bin:/usr/bin
              PYTHONPATH=/root:/pkg:/srv/lib
              A=second secret
              PIP_INDEX_URL=https://image
              HOME=/home/app
              REQUESTS_CA_BUNDLE=/__ionian/ca-certificates.crt
              PIP_CERT=/__ionian/ca-certificates.crt
              CURL_CA_BUNDLE=/__ionian/ca-certificates.crt
              NODE_EXTRA_CA_CERTS=/__ionian/ca-certificates.crt
              GIT_SSL_CAINFO=/__ionian/ca-certificates.crt
              AWS_CA_BUNDLE=/__ionian/ca-certificates.crt
              CARGO_HTTP_CAINFO=/__ionian/ca-certificates.crt
              SSL_CERT_FILE=/mine.crt
              MODAL_TASK_ID=ta-1
              IONIAN_WEB_HOOK=0
              PYTHONUNBUFFERED=0
              MODAL_IS_REMOTE=1
              MODAL_CONTAINER_ARGUMENTS_PATH=/__ionian/run/arguments.bin
              IONIAN_WEB_BIND=0.0.0.0
              IONIAN_CLIENT_DEPS=0
            /b/pkg -> /pkg ro
            /b/extra -> /__ionian/deps ro
            /state/hook -> /__ionian/hook ro
            /state/run/arguments.bin -> /__ionian/run/arguments.bin ro
            /host.crt -> /__ionian/ca-certificates.crt ro
            Limits { memory_bytes: Some(268435456), cpu_millis: Some(500), pids: Some(4096) } Bridge Allow([Cidr { base: 10.0.0.0, prefix: 8 }])
        "]],
        );
    }

    #[test]
    fn a_plain_process() {
        let mut spec = spec();
        spec.secret_env = vec![pair("KEY", "value")];
        spec.egress = Egress::Blocked;
        Arc::make_mut(&mut spec.image).config.env.push(pair("LANG", "C.UTF-8"));
        let prepared = PreparedProcess {
            python: Path::new("/venv/bin/python"),
            files_dir: Path::new("/state/run/files"),
            hook_dir: Path::new("/state/hook"),
            arguments_file: Path::new("/state/run/arguments.bin"),
            trust_env: &[],
            host_path: "/usr/bin",
        };
        expect![[r"
            /venv/bin/python -u /state/hook/ionian_container/launcher.py in /state/run/files/root as root
              LANG=C.UTF-8
              KEY=value
              PATH=/usr/bin
              HOME=/state/run/files/root
              PYTHONPATH=/state/run/files/root
              PYTHONUNBUFFERED=1
              MODAL_IS_REMOTE=1
              MODAL_TASK_ID=ta-1
              MODAL_CONTAINER_ARGUMENTS_PATH=/state/run/arguments.bin
              IONIAN_WEB_BIND=127.0.0.1
              IONIAN_WEB_HOOK=1
              IONIAN_CLIENT_DEPS=0
            Limits { memory_bytes: None, cpu_millis: None, pids: None } Host Blocked
        "]]
        .assert_eq(&show(&process(ContainerId::generate(), &spec, &prepared)));
    }

    #[test]
    fn no_container_gets_more_memory_than_the_host_can_lose() {
        let mut spec = spec();
        let defaults = DefaultLimits {
            memory_bytes: Some(1 << 30),
            pids: 10,
        };
        spec.resources.memory_limit_mib = Some(4096);
        assert_eq!(limits(&spec, defaults).memory_bytes, Some(1 << 30));
        spec.resources.memory_limit_mib = Some(64);
        assert_eq!(limits(&spec, defaults).memory_bytes, Some(64 << 20));
        let unlimited = DefaultLimits {
            memory_bytes: None,
            pids: 10,
        };
        spec.resources.memory_limit_mib = None;
        assert_eq!(limits(&spec, unlimited).memory_bytes, None);
    }

    #[test]
    fn the_users_path_is_searched() {
        let mut spec = spec();
        assert_eq!(search_path(&spec), "/usr/local/bin:/usr/bin");
        spec.secret_env.push(pair("PATH", "/opt/bin"));
        assert_eq!(search_path(&spec), "/opt/bin");
        spec.secret_env.clear();
        Arc::make_mut(&mut spec.image).config.env.clear();
        assert_eq!(search_path(&spec), DEFAULT_PATH);
    }
}
