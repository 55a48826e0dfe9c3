//! Web endpoints: what was declared, and the tables by which requests find their containers.

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ids::{AppId, ContainerId, FunctionId};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WebKind {
    AsgiApp,
    /// `@modal.fastapi_endpoint`: one route around one function.
    FastapiEndpoint,
    WsgiApp,
    /// A server of the user's own on a port of the container.
    WebServer,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WebSpec {
    pub kind: WebKind,
    /// The label of the web URL, without workspace and domain; unique in the environment.
    pub label: String,
    /// Set where the wanted label was cut to 63 characters.
    pub label_truncated: bool,
    pub requires_proxy_auth: bool,
    /// The port of a [`WebKind::WebServer`].
    pub port: Option<u16>,
    pub startup_timeout: Duration,
}

/// One endpoint that a container's web hook announced: a web method (`None` for functions) and the port of
/// the container on which it is served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnnouncedEndpoint {
    pub method: Option<String>,
    pub port: u16,
}

/// One endpoint that the ingress can reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The first label of the host name: `<workspace>--<label>`.
    pub host_label: String,
    pub app_id: AppId,
    pub app_name: String,
    pub function_id: FunctionId,
    pub function_name: String,
    /// The web method, for endpoints on classes.
    pub method: Option<String>,
    pub kind: WebKind,
    /// How many requests one container takes at a time.
    pub slots_per_container: u32,
    /// How long one request may take, from the moment it holds a slot.
    pub timeout: Duration,
    /// How long a request may wait for a container.
    pub startup_timeout: Duration,
    pub requires_proxy_auth: bool,
}

/// How a ready web container is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WebTarget {
    /// HTTP straight to a socket in the container.
    Direct(SocketAddr),
    /// The official runtime's own data channel, where the web hook could not attach.
    DataChannel,
}

/// A change in a function's pool of web containers, told to the ingress in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PoolEvent {
    /// The container takes requests from now on. `targets` maps a web method (`None` for functions)
    /// to where it is served.
    Ready {
        function_id: FunctionId,
        container_id: ContainerId,
        slots: u32,
        targets: Vec<(Option<String>, WebTarget)>,
    },
    /// Give it no new requests. The ingress answers with a demand report once it is empty.
    Draining {
        function_id: FunctionId,
        container_id: ContainerId,
    },
    /// It is gone; whoever still waits for it gets an error.
    Gone {
        function_id: FunctionId,
        container_id: ContainerId,
    },
    /// Containers of this function cannot start (import error, image missing …): waiting requests
    /// fail now with this message instead of at their deadline.
    StartFailed {
        function_id: FunctionId,
        container_id: ContainerId,
        message: String,
    },
}
