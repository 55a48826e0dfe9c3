//! Between the messages of the worker protocol and the domain's nouns, as the worker sees them.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use ionian_domain::container::{ContainerExit, ContainerSpec, ContainerStarted, RuntimeKind, StopReason, WebHookMode};
use ionian_domain::function::{GpuRequest, Resources, VolumeMount};
use ionian_domain::image::{BuiltImage, ImageConfig, ImageMetadata, ImageSpec, RegistryAuth};
use ionian_domain::log::LogEntry;
use ionian_domain::mount::MountFile;
use ionian_domain::network::Egress;
use ionian_domain::worker::{DesiredState, WorkerReport};
use ionian_domain::{ContainerId, ImageId};
use ionian_image::base::RegistryCredentials;
use ionian_image::{BuildRequest, ContextEntry};
use ionian_proto::worker as pb;

use crate::builds::{BuildFailure, BuildLine, BuildOrder};

/// The other side sent something that is not of this protocol.
#[derive(Debug, thiserror::Error)]
#[error("the server sent {what} that this worker does not understand; both should be of the same version")]
pub(crate) struct Malformed {
    pub(crate) what: &'static str,
}

pub(crate) const fn malformed(what: &'static str) -> Malformed {
    Malformed { what }
}

pub(crate) fn id<T: FromStr>(text: &str) -> Result<T, Malformed> {
    text.parse().map_err(|_| malformed("an id"))
}

pub(crate) fn runtime(kind: RuntimeKind) -> pb::RuntimeKind {
    match kind {
        RuntimeKind::Runc => pb::RuntimeKind::Runc,
        RuntimeKind::Gvisor => pb::RuntimeKind::Gvisor,
        RuntimeKind::Process => pb::RuntimeKind::Process,
    }
}

pub(crate) fn report(report: WorkerReport) -> pb::from_worker::Message {
    match report {
        WorkerReport::Started(report) => pb::from_worker::Message::Started(started(&report)),
        WorkerReport::Exited { container_id, exit } => pb::from_worker::Message::Exited(pb::Exited {
            container_id: container_id.to_string(),
            exit: Some(pb::Exit {
                kind: Some(match exit {
                    ContainerExit::StartFailed { message } => pb::exit::Kind::StartFailed(message),
                    ContainerExit::Exited { code } => pb::exit::Kind::Exited(code),
                    ContainerExit::Signaled { signal } => pb::exit::Kind::Signaled(signal),
                    ContainerExit::OutOfMemory => pb::exit::Kind::OutOfMemory(pb::Nothing {}),
                    ContainerExit::Lost => pb::exit::Kind::Lost(pb::Nothing {}),
                }),
            }),
        }),
    }
}

pub(crate) fn started(started: &ContainerStarted) -> pb::Started {
    pb::Started {
        container_id: started.container_id.to_string(),
        address: started.address.to_string(),
        steps: started
            .timings
            .steps
            .iter()
            .map(|(name, took)| pb::StartStep {
                name: name.clone(),
                micros: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
            })
            .collect(),
    }
}

pub(crate) fn log_entry(entry: LogEntry) -> pb::LogEntry {
    pb::LogEntry {
        at_micros: entry.at.micros(),
        app_id: entry.app_id.to_string(),
        function_id: entry.function_id.to_string(),
        container_id: entry.container_id.to_string(),
        stream: entry.stream.wire(),
        text: entry.text,
    }
}

pub(crate) fn build_line(line: BuildLine) -> pb::BuildLine {
    pb::BuildLine {
        at_micros: line.at.micros(),
        stream: line.stream.wire(),
        text: line.text,
    }
}

pub(crate) fn build_ended(build_id: String, result: Result<BuiltImage, BuildFailure>) -> pb::BuildEnded {
    let result = match result {
        Ok(image) => pb::build_ended::Result::Image(image_to_wire(image)),
        Err(failure) => pb::build_ended::Result::Failure(pb::BuildFailure {
            by_user: failure.by_user,
            message: failure.message,
        }),
    };
    pb::BuildEnded {
        build_id,
        result: Some(result),
    }
}

pub(crate) fn state(stop: Option<pb::Stop>) -> Result<DesiredState, Malformed> {
    let Some(stop) = stop else {
        return Ok(DesiredState::Running);
    };
    let reason = match stop.reason() {
        pb::StopReason::ScaleDown => StopReason::ScaleDown,
        pb::StopReason::Superseded => StopReason::Superseded,
        pb::StopReason::AppStopped => StopReason::AppStopped,
        pb::StopReason::TimedOut => StopReason::TimedOut,
        pb::StopReason::Requested => StopReason::Requested,
        pb::StopReason::ShuttingDown => StopReason::ShuttingDown,
        pb::StopReason::Unspecified => return Err(malformed("a reason to stop")),
    };
    Ok(DesiredState::Stopped {
        grace: Duration::from_millis(stop.grace_millis),
        reason,
    })
}

pub(crate) fn spec(spec: pb::ContainerSpec) -> Result<(ContainerId, ContainerSpec), Malformed> {
    let runtime = match spec.runtime() {
        pb::RuntimeKind::Runc => RuntimeKind::Runc,
        pb::RuntimeKind::Gvisor => RuntimeKind::Gvisor,
        pb::RuntimeKind::Process => RuntimeKind::Process,
        pb::RuntimeKind::Unspecified => return Err(malformed("a runtime")),
    };
    let image = spec.image.ok_or(malformed("a container without an image"))?;
    let volumes = spec.volumes.into_iter().map(|volume| {
        Ok(VolumeMount {
            volume_id: id(&volume.volume_id)?,
            path: volume.path,
            read_only: volume.read_only,
            sub_path: volume.sub_path,
        })
    });
    let resources = spec.resources.unwrap_or_default();
    let web_hook = if spec.web_hook {
        WebHookMode::On
    } else {
        WebHookMode::Off
    };
    let container = ContainerSpec {
        app_id: id(&spec.app_id)?,
        function_id: id(&spec.function_id)?,
        function_name: spec.function_name,
        runtime,
        image_id: id(&spec.image_id)?,
        image: Arc::new(image_from_wire(image)),
        files: spec.files.into_iter().map(file).collect(),
        volumes: volumes.collect::<Result<_, _>>()?,
        resources: Resources {
            memory_mib: resources.memory_mib,
            memory_limit_mib: resources.memory_limit_mib,
            cpu_millis: resources.cpu_millis,
            cpu_limit_millis: resources.cpu_limit_millis,
            ephemeral_disk_mib: resources.ephemeral_disk_mib,
            gpu: resources.gpu.map(|gpu| GpuRequest {
                kind: gpu.kind,
                count: gpu.count,
            }),
        },
        secret_env: pairs(spec.secret_env).collect(),
        platform_env: pairs(spec.platform_env).collect(),
        arguments: spec.arguments,
        client_version: spec.client_version,
        mount_client_dependencies: spec.mount_client_dependencies,
        web_hook,
        egress: egress(spec.egress)?,
    };
    Ok((id(&spec.container_id)?, container))
}

fn egress(egress: Option<pb::Egress>) -> Result<Egress, Malformed> {
    let Some(egress) = egress else {
        return Ok(Egress::Open);
    };
    if egress.allowed_cidrs.is_empty() {
        return Ok(Egress::Blocked);
    }
    let ranges = egress.allowed_cidrs.iter().map(|text| text.parse());
    ranges
        .collect::<Result<_, _>>()
        .map(Egress::Allow)
        .map_err(|_| malformed("a range of addresses"))
}

pub(crate) fn build(build: pb::Build) -> Result<BuildOrder, Malformed> {
    let bases = build.bases.into_iter().map(|base| {
        let image = base.image.ok_or(malformed("a base without an image"))?;
        Ok((base.name, image_from_wire(image)))
    });
    let bases = bases.collect::<Result<BTreeMap<_, _>, Malformed>>()?;
    let request = BuildRequest {
        spec: ImageSpec {
            // Only names that the control process resolved already.
            base_images: bases.keys().map(|name| (name.clone(), ImageId::generate())).collect(),
            dockerfile_commands: build.dockerfile_commands,
            // All files come in the context, all secrets by value.
            context_files: Vec::new(),
            context_mount_id: None,
            secret_ids: Vec::new(),
            build_args: build.build_args,
            registry_auth: RegistryAuth::Public,
            gpu: build.gpu,
            build_function_id: None,
            builder_version: build.builder_version,
        },
        bases,
        context: build
            .context
            .into_iter()
            .map(|file| ContextEntry {
                path: file.path,
                sha256_hex: file.sha256_hex,
                mode: file.mode,
            })
            .collect(),
        secrets: pairs(build.secrets).collect(),
        registry_auth: build.registry_login.map(|login| RegistryCredentials {
            username: login.username,
            password: login.password,
        }),
        force: build.force,
    };
    Ok(BuildOrder {
        request,
        client_version: build.client_version,
    })
}

fn file(file: pb::File) -> MountFile {
    MountFile {
        path: file.path,
        sha256_hex: file.sha256_hex,
        mode: file.mode,
    }
}

fn pairs(variables: Vec<pb::Variable>) -> impl Iterator<Item = (String, String)> {
    variables.into_iter().map(|variable| (variable.name, variable.value))
}

fn image_from_wire(image: pb::BuiltImage) -> BuiltImage {
    BuiltImage {
        layers: image.layers,
        config: ImageConfig {
            env: pairs(image.env).collect(),
            workdir: image.workdir,
            user: image.user,
            entrypoint: image.entrypoint,
            cmd: image.cmd,
            shell: image.shell,
        },
        metadata: ImageMetadata {
            python_version_info: image.python_version_info,
            libc_version_info: image.libc_version_info,
            python_packages: image.python_packages,
        },
    }
}

fn image_to_wire(image: BuiltImage) -> pb::BuiltImage {
    let variable = |(name, value)| pb::Variable { name, value };
    pb::BuiltImage {
        layers: image.layers,
        env: image.config.env.into_iter().map(variable).collect(),
        workdir: image.config.workdir,
        user: image.config.user,
        entrypoint: image.config.entrypoint,
        cmd: image.config.cmd,
        shell: image.config.shell,
        python_version_info: image.metadata.python_version_info,
        libc_version_info: image.metadata.libc_version_info,
        python_packages: image.metadata.python_packages,
    }
}
