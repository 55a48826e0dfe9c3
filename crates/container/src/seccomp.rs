//! Which system calls a container may make.
//!
//! A list of what is allowed; everything else fails with EPERM. What is left out, and why:
//!
//! - what changes the machine: clocks, swap, modules, reboot, quotas, kernel keys, accounting;
//! - what builds namespaces or mounts: containers in containers are the other runtime's business;
//! - large parts of the kernel that a Python program does not need and that have had many holes: `bpf`,
//!   `perf_event_open`, `userfaultfd`, `ptrace`, `keyctl`, `io_uring`, and sockets of families other than
//!   unix, IP and netlink;
//! - calls for 32-bit programs: those end with SIGSYS.
//!
//! Some of these fail with ENOSYS instead, since libraries then use an older way: `clone3` (its flags are in
//! memory, where a filter cannot see them) and `io_uring_setup`.

use oci_spec::OciSpecError;
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder, LinuxSeccompBuilder,
    LinuxSeccompOperator, LinuxSyscall, LinuxSyscallBuilder,
};

const EPERM: u32 = nix::libc::EPERM as u32;
const ENOSYS: u32 = nix::libc::ENOSYS as u32;

/// Every `CLONE_NEW*` flag that `clone` takes.
const NEW_NAMESPACES: u64 = 0x7e02_0000;

const SOCKET_FAMILIES: [i32; 4] = [
    nix::libc::AF_UNIX,
    nix::libc::AF_INET,
    nix::libc::AF_INET6,
    nix::libc::AF_NETLINK,
];

/// Linux, 32-bit addresses, both, and the value that asks without changing.
const PERSONALITIES: [u64; 5] = [0x0, 0x0008, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Unknown names, such as those of the other architecture, are skipped by runc.
#[rustfmt::skip]
const ALLOWED: &[&str] = &[
    // Files and directories.
    "access", "chdir", "chmod", "chown", "close", "close_range", "copy_file_range", "creat", "dup", "dup2", "dup3",
    "faccessat", "faccessat2", "fadvise64", "fallocate", "fchdir", "fchmod", "fchmodat", "fchmodat2", "fchown",
    "fchownat", "fcntl", "fdatasync", "fgetxattr", "flistxattr", "flock", "fremovexattr", "fsetxattr", "fstat",
    "fstatfs", "fsync", "ftruncate", "futimesat", "getcwd", "getdents", "getdents64", "getxattr", "getxattrat",
    "ioctl", "lchown", "lgetxattr", "link", "linkat", "listxattr", "listxattrat", "llistxattr", "lremovexattr",
    "lseek", "lsetxattr", "lstat", "mkdir", "mkdirat", "mknod", "mknodat", "name_to_handle_at", "newfstatat", "open",
    "openat", "openat2", "pipe", "pipe2", "pread64", "preadv", "preadv2", "pwrite64", "pwritev", "pwritev2", "read",
    "readahead", "readlink", "readlinkat", "readv", "removexattr", "removexattrat", "rename", "renameat",
    "renameat2", "rmdir", "sendfile", "setxattr", "setxattrat", "splice", "stat", "statfs", "statmount", "statx",
    "symlink", "symlinkat", "sync", "sync_file_range", "syncfs", "tee", "truncate", "umask", "unlink", "unlinkat",
    "utime", "utimensat", "utimes", "vmsplice", "write", "writev", "ustat", "chroot", "cachestat",
    // Waiting and notification.
    "epoll_create", "epoll_create1", "epoll_ctl", "epoll_ctl_old", "epoll_pwait", "epoll_pwait2", "epoll_wait",
    "epoll_wait_old", "eventfd", "eventfd2", "inotify_add_watch", "inotify_init", "inotify_init1",
    "inotify_rm_watch", "io_cancel", "io_destroy", "io_getevents", "io_pgetevents", "io_setup", "io_submit", "poll",
    "ppoll", "pselect6", "select", "signalfd", "signalfd4", "timerfd_create", "timerfd_gettime", "timerfd_settime",
    // Memory.
    "brk", "get_mempolicy", "madvise", "map_shadow_stack", "mbind", "membarrier", "memfd_create", "memfd_secret",
    "mincore", "mlock", "mlock2", "mlockall", "mmap", "mprotect", "mremap", "mseal", "msync", "munlock",
    "munlockall", "munmap", "pkey_alloc", "pkey_free", "pkey_mprotect", "process_madvise", "process_mrelease",
    "remap_file_pages", "set_mempolicy", "set_mempolicy_home_node",
    // Processes and threads. `clone` has a condition of its own.
    "arch_prctl", "capget", "capset", "execve", "execveat", "exit", "exit_group", "fork", "futex", "futex_requeue",
    "futex_wait", "futex_waitv", "futex_wake", "get_robust_list", "get_thread_area", "getcpu", "getegid", "geteuid",
    "getgid", "getgroups", "getpgid", "getpgrp", "getpid", "getppid", "getpriority", "getresgid", "getresuid",
    "getrlimit", "getrusage", "getsid", "gettid", "getuid", "ioprio_get", "ioprio_set", "kill", "landlock_add_rule",
    "landlock_create_ruleset", "landlock_restrict_self", "modify_ldt", "pause", "pidfd_open", "pidfd_send_signal",
    "prctl", "prlimit64", "process_vm_readv", "process_vm_writev", "restart_syscall", "rseq", "sched_get_priority_max",
    "sched_get_priority_min", "sched_getaffinity", "sched_getattr", "sched_getparam", "sched_getscheduler",
    "sched_rr_get_interval", "sched_setaffinity", "sched_setattr", "sched_setparam", "sched_setscheduler",
    "sched_yield", "seccomp", "set_robust_list", "set_thread_area", "set_tid_address", "setfsgid", "setfsuid",
    "setgid", "setgroups", "setpgid", "setpriority", "setregid", "setresgid", "setresuid", "setreuid", "setrlimit",
    "setsid", "setuid", "tgkill", "time", "tkill", "vfork", "wait4", "waitid", "waitpid",
    // Signals and time.
    "alarm", "adjtimex", "clock_adjtime", "clock_getres", "clock_gettime", "clock_nanosleep", "getitimer",
    "gettimeofday", "nanosleep", "rt_sigaction", "rt_sigpending", "rt_sigprocmask", "rt_sigqueueinfo",
    "rt_sigreturn", "rt_sigsuspend", "rt_sigtimedwait", "rt_tgsigqueueinfo", "setitimer", "sigaltstack", "sigreturn",
    "timer_create", "timer_delete", "timer_getoverrun", "timer_gettime", "timer_settime", "times",
    // Network. `socket` has a condition of its own.
    "accept", "accept4", "bind", "connect", "getpeername", "getsockname", "getsockopt", "listen", "recvfrom",
    "recvmmsg", "recvmsg", "sendmmsg", "sendmsg", "sendto", "setsockopt", "shutdown", "socketpair",
    // Between processes.
    "mq_getsetattr", "mq_notify", "mq_open", "mq_timedreceive", "mq_timedsend", "mq_unlink", "msgctl", "msgget",
    "msgrcv", "msgsnd", "semctl", "semget", "semop", "semtimedop", "shmat", "shmctl", "shmdt", "shmget",
    // About the machine.
    "getrandom", "sysinfo", "uname", "riscv_flush_icache", "riscv_hwprobe",
];

pub(crate) fn profile() -> Result<LinuxSeccomp, OciSpecError> {
    let mut syscalls = vec![
        allow(ALLOWED, Vec::new())?,
        allow(
            &["clone"],
            vec![argument(
                0,
                NEW_NAMESPACES,
                Some(0),
                LinuxSeccompOperator::ScmpCmpMaskedEq,
            )?],
        )?,
        refuse(
            &["clone3", "io_uring_setup", "io_uring_enter", "io_uring_register"],
            ENOSYS,
        )?,
    ];
    for family in SOCKET_FAMILIES {
        syscalls.push(allow(
            &["socket"],
            vec![argument(0, family as u64, None, LinuxSeccompOperator::ScmpCmpEq)?],
        )?);
    }
    for personality in PERSONALITIES {
        let condition = argument(0, personality, None, LinuxSeccompOperator::ScmpCmpEq)?;
        syscalls.push(allow(&["personality"], vec![condition])?);
    }
    LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActErrno)
        .default_errno_ret(EPERM)
        .architectures(vec![NATIVE])
        .syscalls(syscalls)
        .build()
}

#[cfg(target_arch = "x86_64")]
const NATIVE: Arch = Arch::ScmpArchX86_64;
#[cfg(target_arch = "aarch64")]
const NATIVE: Arch = Arch::ScmpArchAarch64;

fn allow(names: &[&str], conditions: Vec<LinuxSeccompArg>) -> Result<LinuxSyscall, OciSpecError> {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let builder = LinuxSyscallBuilder::default()
        .names(names)
        .action(LinuxSeccompAction::ScmpActAllow);
    if conditions.is_empty() {
        builder.build()
    } else {
        builder.args(conditions).build()
    }
}

fn refuse(names: &[&str], errno: u32) -> Result<LinuxSyscall, OciSpecError> {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    LinuxSyscallBuilder::default()
        .names(names)
        .action(LinuxSeccompAction::ScmpActErrno)
        .errno_ret(errno)
        .build()
}

fn argument(
    index: usize,
    value: u64,
    value_two: Option<u64>,
    operator: LinuxSeccompOperator,
) -> Result<LinuxSeccompArg, OciSpecError> {
    let builder = LinuxSeccompArgBuilder::default().index(index).value(value).op(operator);
    match value_two {
        Some(value_two) => builder.value_two(value_two).build(),
        None => builder.build(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_must_never_be_allowed_is_not() {
        for name in [
            "mount",
            "umount2",
            "pivot_root",
            "move_mount",
            "open_tree",
            "fsopen",
            "fsmount",
            "unshare",
            "setns",
            "bpf",
            "keyctl",
            "add_key",
            "request_key",
            "ptrace",
            "perf_event_open",
            "userfaultfd",
            "kexec_load",
            "init_module",
            "finit_module",
            "delete_module",
            "reboot",
            "swapon",
            "swapoff",
            "open_by_handle_at",
            "settimeofday",
            "clock_settime",
            "iopl",
            "ioperm",
            "quotactl",
            "acct",
            "clone",
            "clone3",
            "socket",
            "personality",
            "io_uring_setup",
            "pidfd_getfd",
            "kcmp",
            "lookup_dcookie",
            "vhangup",
            "nfsservctl",
            // Reads the host's kernel log where `dmesg_restrict` is off.
            "syslog",
        ] {
            assert!(!ALLOWED.contains(&name), "{name}");
        }
    }

    #[test]
    fn the_list_has_each_name_once() {
        let mut names = ALLOWED.to_vec();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
        profile().unwrap();
    }
}
