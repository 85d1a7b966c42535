//! What nodes cost in memory, one after the other on one host.
//!
//! Ours: so many containers and one daemon. Theirs: a daemon for each; ten are measured, and more
//! are taken to cost as much each.

use std::{sync::Arc, thread, time::Duration};

use tailnode_tests::{Host, Underlay};

use crate::{
    Plan,
    contender::Contender,
    machine::{self, Machine},
    report::{MIB_PER_NODE, Report},
    traffic::Tcp,
    usage,
};

/// Numbers of nodes that are looked at, and the same of a quick run.
const COUNTS: [usize; 3] = [1, 10, 100];
const QUICK_COUNTS: [usize; 2] = [1, 10];
/// So many processes of theirs stand for more.
const MOST_DAEMONS: usize = 10;
/// What a node takes to come to rest.
const REST: Duration = Duration::from_secs(5);
/// How long each node sends, and receives.
const LOAD: Duration = Duration::from_millis(250);

/// Idle, and after each has sent and received.
pub fn of_many_nodes(plan: &Plan, contender: Contender, report: &mut Report) {
    let underlay = Underlay::new();
    let (tailnet, key) = machine::control(&underlay);
    let host = Arc::new(Host::start(&underlay, &tailnet, &key));
    let machine = |name: &str| match contender {
        Contender::Tailscaled(release) => machine::gopher(release, &underlay, &tailnet, &key, name),
        _ => Machine::ours(&host, name),
    };
    let other = match contender {
        Contender::Tailscaled(_) => machine("other"),
        _ => {
            let host = Host::start(&underlay, &tailnet, &key);
            Machine::ours(&Arc::new(host), "other")
        }
    };
    let counts: &[usize] = if plan.quick { &QUICK_COUNTS } else { &COUNTS };
    let mut machines = Vec::new();
    for &count in counts {
        while machines.len() < measured(contender, count) {
            machines.push(machine(&format!("node{}", machines.len())));
        }
        thread::sleep(REST);
        add(contender, "idle", count, &machines, report);
    }
    for machine in &machines {
        for back in [false, true] {
            let load = Tcp {
                streams: 1,
                time: LOAD,
                congestion: None,
                back,
            };
            load.run(machine, &other).unwrap();
        }
    }
    let count = counts[counts.len() - 1];
    add(contender, "loaded", count, &machines, report);
    thread::sleep(REST);
    add(contender, "rested", count, &machines, report);
}

fn measured(contender: Contender, count: usize) -> usize {
    match contender {
        Contender::Tailscaled(_) => count.min(MOST_DAEMONS),
        _ => count,
    }
}

fn add(contender: Contender, state: &str, count: usize, machines: &[Machine], report: &mut Report) {
    let mut daemons: Vec<u32> = machines.iter().filter_map(Machine::daemon).collect();
    daemons.dedup();
    let each = usage::pss(&daemons) / machines.len() as f64 / f64::from(1 << 20);
    report.add(
        contender,
        &format!("memory/{state}/{count}"),
        MIB_PER_NODE,
        each,
    );
}
