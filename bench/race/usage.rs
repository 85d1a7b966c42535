//! What processes have used, as the kernel counts it.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::{
    time::clock_getcpuclockid,
    unistd::{Pid, SysconfVar, sysconf},
};

/// CPU seconds of these processes and all their threads, since they started; in user and in kernel
/// mode.
pub fn cpu(processes: &[u32]) -> f64 {
    processes.iter().map(|&id| cpu_of(id).as_secs_f64()).sum()
}

/// The whole machine from a moment on: whatever the kernel does for the traffic, in whoever's name.
pub struct Machine {
    since: Instant,
    idle: f64,
}

impl Machine {
    pub fn now() -> Machine {
        Machine {
            since: Instant::now(),
            idle: idle(),
        }
    }

    /// CPU seconds that were spent since. The kernel samples busy time and counts idle time, so this
    /// is what was not idle.
    pub fn cpu(&self) -> f64 {
        let cores = thread::available_parallelism().expect("the number of cores");
        let passed = self.since.elapsed().as_secs_f64() * cores.get() as f64;
        (passed - (idle() - self.idle)).max(0.0)
    }
}

/// Seconds that cores had nothing to do since the machine started.
fn idle() -> f64 {
    let stat = read("/proc/stat");
    // Idle and waiting for disks: fields 4 and 5 of the first line (proc_stat(5)).
    let fields = stat.split_whitespace().skip(4).take(2);
    let ticks: u64 = fields
        .map(|ticks| ticks.parse::<u64>().expect("ticks"))
        .sum();
    ticks as f64 / ticks_per_second()
}

fn ticks_per_second() -> f64 {
    let ticks = sysconf(SysconfVar::CLK_TCK).expect("sysconf");
    ticks.expect("a clock tick") as f64
}

fn cpu_of(id: u32) -> Duration {
    let clock = clock_getcpuclockid(Pid::from_raw(id as i32)).expect("a process that runs");
    clock.now().expect("its clock").into()
}

/// Bytes of memory that these processes have for themselves, shared pages counted by their shares.
pub fn pss(processes: &[u32]) -> f64 {
    let bytes = processes.iter().map(|id| {
        let text = read(format!("/proc/{id}/smaps_rollup"));
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
        let kib = line.and_then(|rest| rest.split_whitespace().next());
        kib.expect("Pss").parse::<f64>().expect("KiB") * 1024.0
    });
    bytes.sum()
}

fn read(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
