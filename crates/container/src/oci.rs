//! The program that turns a bundle into a container: `runc`, or `runsc` with what it does differently.
//!
//! Everything that differs between the two is here or below [`crate::gvisor`], so that a container's life
//! (mounts, network, leftovers, adoption) is written once.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use ionian_domain::container::{ContainerExit, RuntimeKind};
use oci_spec::runtime::Spec;

use crate::bundle::BundlePaths;
use crate::cgroup::Hierarchies;
use crate::gvisor::{self, Sandboxing};
use crate::runtime::{Limits, NetworkMode};

/// A shell's way, and both programs', of reporting a signal as an exit code.
const SIGNAL_EXIT_BASE: i32 = 128;
const MAX_SIGNAL: i32 = 64;

/// Which program, and how it is called.
#[derive(Debug, Clone)]
pub(crate) struct OciProgram {
    pub path: PathBuf,
    /// `None` for runc.
    pub sandboxing: Option<Sandboxing>,
}

/// What one start needs besides the program.
pub(crate) struct RunPlan<'a> {
    /// Where the program keeps what it knows about its containers.
    pub state_root: &'a Path,
    pub paths: &'a BundlePaths,
    pub name: &'a str,
    /// [`crate::ContainerConfig::short_id`].
    pub instance: &'a str,
    pub network: NetworkMode,
    /// From [`OciProgram::create_cgroup`].
    pub join: &'a [PathBuf],
}

impl OciProgram {
    pub(crate) fn runc(path: PathBuf) -> Self {
        Self { path, sandboxing: None }
    }

    pub(crate) fn kind(&self) -> RuntimeKind {
        if self.sandboxing.is_some() {
            RuntimeKind::Gvisor
        } else {
            RuntimeKind::Runc
        }
    }

    /// The command that runs the container in the foreground: a program and its arguments.
    pub(crate) fn run_command(&self, plan: &RunPlan<'_>) -> (PathBuf, Vec<OsString>) {
        if let Some(sandboxing) = &self.sandboxing {
            return sandboxing.run_command(&self.path, plan);
        }
        let arguments = [
            "--root".into(),
            plan.state_root.into(),
            "--log".into(),
            plan.paths.log().into(),
            "--log-format".into(),
            "json".into(),
            "run".into(),
            // What is known about the end (out of memory) is read before the control group goes.
            "--keep".into(),
            "--bundle".into(),
            plan.paths.specification.clone().into(),
            "--pid-file".into(),
            plan.paths.pid_file().into(),
            plan.name.into(),
        ];
        (self.path.clone(), arguments.into())
    }

    /// Makes the control groups that the program does not make itself. Returns what its first process must
    /// join: `cgroup.procs` of each. runc makes its own, and gets none.
    pub(crate) fn create_cgroup(
        &self,
        cgroups: &Hierarchies,
        cgroup: &str,
        limits: Limits,
    ) -> std::io::Result<Vec<PathBuf>> {
        match self.sandboxing {
            Some(_) => cgroups.create(cgroup, gvisor::host_limits(limits)),
            None => Ok(Vec::new()),
        }
    }

    /// Takes out of the specification what the program does not know.
    pub(crate) fn adapt(&self, spec: Spec) -> std::io::Result<Spec> {
        match self.sandboxing {
            Some(_) => gvisor::adapt(spec),
            None => Ok(spec),
        }
    }

    /// What the end of the program says about the container's. `oom_kills` is asked only if it matters.
    pub(crate) fn exit_of(&self, status: ExitStatus, oom_kills: impl FnOnce() -> u64) -> ContainerExit {
        use std::os::unix::process::ExitStatusExt;
        let code = match (status.code(), status.signal()) {
            (Some(code), _) => code,
            // The program itself was killed, from outside.
            (None, Some(signal)) => return ContainerExit::Signaled { signal },
            (None, None) => return ContainerExit::Lost,
        };
        let signal = code - SIGNAL_EXIT_BASE;
        let killed = signal == nix::libc::SIGKILL;
        // A sandbox also ends in other ways than by the kill itself, when the kernel took one of its processes.
        let may_be_memory = killed || (self.sandboxing.is_some() && code != 0);
        if may_be_memory && oom_kills() > 0 {
            return ContainerExit::OutOfMemory;
        }
        if (1..=MAX_SIGNAL).contains(&signal) {
            return ContainerExit::Signaled { signal };
        }
        ContainerExit::Exited { code }
    }

    /// The program's own words about a failed start, without what says only where in the program it was.
    pub(crate) fn plain_refusal(message: &str) -> String {
        const NOISE: [&str; 5] = [
            "runc run failed: ",
            "running container: ",
            "starting container: ",
            "starting root container: ",
            "starting sandbox: ",
        ];
        let mut message = message;
        while let Some(rest) = NOISE.iter().find_map(|noise| message.strip_prefix(noise)) {
            message = rest;
        }
        message.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn the_end_of_the_program_is_told_from_the_containers() {
        let runc = OciProgram::runc(PathBuf::from("runc"));
        let runsc = OciProgram {
            path: PathBuf::from("runsc"),
            sandboxing: Some(Sandboxing::for_tests()),
        };
        let code = |code: i32| ExitStatus::from_raw(code << 8);
        for program in [&runc, &runsc] {
            assert_eq!(program.exit_of(code(7), || 0), ContainerExit::Exited { code: 7 });
            assert_eq!(program.exit_of(code(0), || 1), ContainerExit::Exited { code: 0 });
            assert_eq!(program.exit_of(code(137), || 0), ContainerExit::Signaled { signal: 9 });
            assert_eq!(program.exit_of(code(137), || 1), ContainerExit::OutOfMemory);
            assert_eq!(
                program.exit_of(ExitStatus::from_raw(9), || 1),
                ContainerExit::Signaled { signal: 9 }
            );
        }
        assert_eq!(runc.exit_of(code(2), || 1), ContainerExit::Exited { code: 2 });
        assert_eq!(runsc.exit_of(code(2), || 1), ContainerExit::OutOfMemory);
    }

    #[test]
    fn a_refusal_says_what_is_wrong_first() {
        let message =
            "running container: starting container: starting root container: starting sandbox: error finding x";
        assert_eq!(OciProgram::plain_refusal(message), "error finding x");
        assert_eq!(OciProgram::plain_refusal("runc run failed: exec: \"x\""), "exec: \"x\"");
    }
}
