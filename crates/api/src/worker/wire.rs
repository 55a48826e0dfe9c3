//! Between the domain's nouns and the messages of the worker protocol, as the control process sees them.

use std::str::FromStr;
use std::time::Duration;

use ionian_control::app::images::BuildLine;
use ionian_control::{BuildFailure, BuildJob};
use ionian_domain::container::{
    ContainerExit, ContainerSpec, ContainerStarted, RuntimeKind, StartTimings, StopReason, WebHookMode,
};
use ionian_domain::image::{BuiltImage, ImageConfig, ImageMetadata};
use ionian_domain::log::{LogEntry, LogStream};
use ionian_domain::network::Egress;
use ionian_domain::worker::{DesiredContainer, DesiredState, Generation, WorkerCapacity, WorkerReport};
use ionian_domain::{ContainerId, Timestamp};
use ionian_proto::worker as pb;
use tonic::Status;

fn malformed(what: &str) -> Status {
    Status::invalid_argument(format!(
        "the worker sent {what} that this server does not understand; both should be of the same version"
    ))
}

fn id<T: FromStr>(text: &str) -> Result<T, Status> {
    text.parse().map_err(|_| malformed("an id"))
}

pub(super) fn worker_id(hello: &pb::Hello) -> Result<ionian_domain::WorkerId, Status> {
    id(&hello.worker_id)
}

pub(super) fn capacity(hello: &pb::Hello) -> Result<WorkerCapacity, Status> {
    let capacity = hello.capacity.as_ref().ok_or_else(|| malformed("no capacity"))?;
    // What a newer worker has besides is not for us.
    let runtimes = hello.runtimes().filter_map(|kind| match kind {
        pb::RuntimeKind::Runc => Some(RuntimeKind::Runc),
        pb::RuntimeKind::Gvisor => Some(RuntimeKind::Gvisor),
        pb::RuntimeKind::Process => Some(RuntimeKind::Process),
        pb::RuntimeKind::Unspecified => None,
    });
    Ok(WorkerCapacity {
        runtimes: runtimes.collect(),
        cpu_millis: capacity.cpu_millis,
        memory_mib: capacity.memory_mib,
        max_starting: capacity.max_starting,
    })
}

pub(super) fn started(started: pb::Started) -> Result<WorkerReport, Status> {
    let steps = started.steps.into_iter();
    Ok(WorkerReport::Started(ContainerStarted {
        container_id: id(&started.container_id)?,
        address: started.address.parse().map_err(|_| malformed("an address"))?,
        timings: StartTimings {
            steps: steps
                .map(|step| (step.name, Duration::from_micros(step.micros)))
                .collect(),
        },
    }))
}

pub(super) fn exited(exited: pb::Exited) -> Result<WorkerReport, Status> {
    let kind = exited.exit.and_then(|exit| exit.kind);
    Ok(WorkerReport::Exited {
        container_id: id(&exited.container_id)?,
        exit: match kind.ok_or_else(|| malformed("an exit"))? {
            pb::exit::Kind::StartFailed(message) => ContainerExit::StartFailed { message },
            pb::exit::Kind::Exited(code) => ContainerExit::Exited { code },
            pb::exit::Kind::Signaled(signal) => ContainerExit::Signaled { signal },
            pb::exit::Kind::OutOfMemory(pb::Nothing {}) => ContainerExit::OutOfMemory,
            pb::exit::Kind::Lost(pb::Nothing {}) => ContainerExit::Lost,
        },
    })
}

fn stream(number: i32) -> Result<LogStream, Status> {
    LogStream::from_wire(number).ok_or_else(|| malformed("an output stream"))
}

pub(super) fn log_entries(batch: pb::LogBatch) -> Result<Vec<LogEntry>, Status> {
    let entries = batch.entries.into_iter().map(|entry| {
        Ok(LogEntry {
            at: Timestamp(entry.at_micros),
            app_id: id(&entry.app_id)?,
            function_id: id(&entry.function_id)?,
            container_id: id(&entry.container_id)?,
            stream: stream(entry.stream)?,
            text: entry.text,
        })
    });
    entries.collect()
}

pub(super) fn build_line(line: pb::BuildLine) -> Result<BuildLine, Status> {
    Ok(BuildLine {
        at: Timestamp(line.at_micros),
        stream: stream(line.stream)?,
        text: line.text,
    })
}

pub(super) fn build_result(ended: pb::BuildEnded) -> Result<Result<BuiltImage, BuildFailure>, Status> {
    match ended.result {
        Some(pb::build_ended::Result::Image(image)) => Ok(Ok(image_from_wire(image))),
        Some(pb::build_ended::Result::Failure(failure)) => Ok(Err(BuildFailure {
            by_user: failure.by_user,
            message: failure.message,
        })),
        None => Err(malformed("the end of a build")),
    }
}

pub(super) fn build(build_id: String, job: BuildJob) -> pb::Build {
    pb::Build {
        build_id,
        bases: job
            .bases
            .into_iter()
            .map(|(name, image)| pb::NamedImage {
                name,
                image: Some(image_to_wire(&image)),
            })
            .collect(),
        dockerfile_commands: job.spec.dockerfile_commands,
        // With the files of the definition: control has put them in.
        context: job
            .context
            .into_iter()
            .map(|file| pb::File {
                path: file.path,
                sha256_hex: file.sha256_hex,
                mode: file.mode,
            })
            .collect(),
        build_args: job.spec.build_args,
        secrets: job.secrets.into_iter().map(variable).collect(),
        registry_login: job
            .registry_login
            .map(|(username, password)| pb::RegistryLogin { username, password }),
        gpu: job.spec.gpu,
        builder_version: job.spec.builder_version,
        client_version: job.client_version,
        force: job.force,
    }
}

pub(super) fn desired(generation: Generation, containers: &[DesiredContainer]) -> pb::DesiredSet {
    pb::DesiredSet {
        generation: generation.0,
        containers: containers
            .iter()
            .map(|container| pb::DesiredContainer {
                id: container.id.to_string(),
                stop: stop(container.state),
                must_exist: container.must_exist,
            })
            .collect(),
    }
}

fn stop(state: DesiredState) -> Option<pb::Stop> {
    let DesiredState::Stopped { grace, reason } = state else {
        return None;
    };
    let reason = match reason {
        StopReason::ScaleDown => pb::StopReason::ScaleDown,
        StopReason::Superseded => pb::StopReason::Superseded,
        StopReason::AppStopped => pb::StopReason::AppStopped,
        StopReason::TimedOut => pb::StopReason::TimedOut,
        StopReason::Requested => pb::StopReason::Requested,
        StopReason::ShuttingDown => pb::StopReason::ShuttingDown,
    };
    Some(pb::Stop {
        grace_millis: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
        reason: reason.into(),
    })
}

pub(super) fn spec(container_id: ContainerId, spec: &ContainerSpec) -> pb::ContainerSpec {
    let runtime = match spec.runtime {
        RuntimeKind::Runc => pb::RuntimeKind::Runc,
        RuntimeKind::Gvisor => pb::RuntimeKind::Gvisor,
        RuntimeKind::Process => pb::RuntimeKind::Process,
    };
    pb::ContainerSpec {
        container_id: container_id.to_string(),
        app_id: spec.app_id.to_string(),
        function_id: spec.function_id.to_string(),
        function_name: spec.function_name.clone(),
        runtime: runtime.into(),
        image_id: spec.image_id.to_string(),
        image: Some(image_to_wire(&spec.image)),
        files: spec
            .files
            .iter()
            .map(|file| pb::File {
                path: file.path.clone(),
                sha256_hex: file.sha256_hex.clone(),
                mode: file.mode,
            })
            .collect(),
        volumes: spec
            .volumes
            .iter()
            .map(|volume| pb::VolumeMount {
                volume_id: volume.volume_id.to_string(),
                path: volume.path.clone(),
                read_only: volume.read_only,
                sub_path: volume.sub_path.clone(),
            })
            .collect(),
        resources: Some(pb::Resources {
            memory_mib: spec.resources.memory_mib,
            memory_limit_mib: spec.resources.memory_limit_mib,
            cpu_millis: spec.resources.cpu_millis,
            cpu_limit_millis: spec.resources.cpu_limit_millis,
            ephemeral_disk_mib: spec.resources.ephemeral_disk_mib,
            gpu: spec.resources.gpu.as_ref().map(|gpu| pb::GpuRequest {
                kind: gpu.kind.clone(),
                count: gpu.count,
            }),
        }),
        secret_env: spec.secret_env.iter().cloned().map(variable).collect(),
        platform_env: spec
            .platform_env
            .iter()
            .map(|(name, value)| variable((name.clone(), value.clone())))
            .collect(),
        arguments: spec.arguments.clone(),
        client_version: spec.client_version.clone(),
        mount_client_dependencies: spec.mount_client_dependencies,
        web_hook: spec.web_hook == WebHookMode::On,
        egress: egress(&spec.egress),
    }
}

fn egress(egress: &Egress) -> Option<pb::Egress> {
    let ranges = match egress {
        Egress::Open => return None,
        Egress::Blocked => &[][..],
        Egress::Allow(ranges) => ranges,
    };
    Some(pb::Egress {
        allowed_cidrs: ranges.iter().map(ToString::to_string).collect(),
    })
}

fn variable((name, value): (String, String)) -> pb::Variable {
    pb::Variable { name, value }
}

fn image_to_wire(image: &BuiltImage) -> pb::BuiltImage {
    let image = image.clone();
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

fn image_from_wire(image: pb::BuiltImage) -> BuiltImage {
    BuiltImage {
        layers: image.layers,
        config: ImageConfig {
            env: image.env.into_iter().map(|pair| (pair.name, pair.value)).collect(),
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
