//! What the operator decides about the application. Filled by `server`, the only reader of configuration.

use std::path::PathBuf;
use std::time::Duration;

use ionian_domain::container::RuntimeKind;
use ionian_domain::function::FunctionSpec;
use ionian_domain::worker::WorkerCapacity;

#[derive(Debug, Clone)]
pub struct ControlConfig {
    pub workspace: String,
    /// `http` or `https`: how the world reaches the public listener.
    pub public_scheme: String,
    pub base_domain: String,
    /// The port in public URLs; left out where it is the scheme's own.
    pub public_port: u16,
    /// What the client is told to build images with, unless it says otherwise.
    pub image_builder_version: String,
    /// For functions that choose none.
    pub runtime: RuntimeKind,
    /// Whether a function may choose a runtime that isolates less than that.
    pub allow_weaker_runtime: bool,
    /// How containers reach us: `http://<gateway>:<port>`.
    pub container_server_url: String,
    /// Serve web endpoints by the hook; off forces the official data channel.
    pub web_hook: bool,
    /// Where logs and other files of control lie.
    pub data_dir: PathBuf,
    pub default_scaledown_window: Duration,
    /// An ephemeral app whose client sends no heartbeat for this long is stopped. The client sends one
    /// every 15 s and gives up itself after some failures.
    pub client_heartbeat_timeout: Duration,
    /// Where turns of the scheduler are noted, for diagnosis.
    pub journal: Option<PathBuf>,
    /// What the worker in this process offers to containers; `None` where all workers are other processes.
    pub capacity: Option<WorkerCapacity>,
    pub scheduler: ionian_scheduler::Config,
}

impl ControlConfig {
    /// What containers of a function are started with. One that was deployed when the operator asked for less
    /// gets what is asked for now.
    pub fn runtime_of(&self, function: &FunctionSpec) -> RuntimeKind {
        let wanted = function.runtime.unwrap_or(self.runtime);
        if wanted.is_as_strong_as(self.runtime) || self.allow_weaker_runtime {
            wanted
        } else {
            self.runtime
        }
    }

    pub fn public_url(&self, host: &str) -> String {
        let default_port = match self.public_scheme.as_str() {
            "https" => 443,
            _ => 80,
        };
        if self.public_port == default_port {
            format!("{}://{host}", self.public_scheme)
        } else {
            format!("{}://{host}:{}", self.public_scheme, self.public_port)
        }
    }

    /// The URL of a web endpoint by its host label.
    pub fn web_url(&self, host_label: &str) -> String {
        self.public_url(&format!("{host_label}.{}", self.base_domain))
    }
}
