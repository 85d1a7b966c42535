//! Traffic between two apps: how much passes, at what cost, and how soon.

use std::{thread, time::Duration};

use crate::{
    Plan,
    contender::Contender,
    machine::Pair,
    report::{
        CPU_PER_GB, CPU_PER_PACKET, GBIT, MACHINE_PER_GB, MIB_PER_NODE, MILLISECONDS, PACKETS,
        PERCENT_LOST, Report,
    },
    traffic::{self, Tcp, Udp},
    usage,
};

/// The host's own congestion control, and the one that most hosts have.
const DEFAULT: Option<&str> = None;
const CUBIC: Option<&str> = Some("cubic");
/// Datagrams a second that everyone can carry, and that busy apps send.
const PACES: [u32; 2] = [20_000, 50_000];

/// Two hosts, one container each.
pub fn between_hosts(plan: &Plan, contender: Contender, report: &mut Report) {
    let pair = Pair::start(contender);
    let time = plan.time;
    if plan.wants("rtt") {
        let times = traffic::pings(&pair.near, &pair.far, time).unwrap();
        add_times(contender, "rtt/idle", &times, report);
    }
    if plan.wants("tcp") {
        let controls: &[_] = match contender {
            _ if plan.quick => &[DEFAULT],
            Contender::WireguardGo | Contender::Veth => &[DEFAULT],
            _ => &[DEFAULT, CUBIC],
        };
        for &congestion in controls {
            streams(plan, &pair, contender, "tcp", congestion, report);
        }
        if contender.is_node() {
            let pss = usage::pss(&pair.daemons()) / 2.0 / f64::from(1 << 20);
            report.add(contender, "memory/after-tcp/1", MIB_PER_NODE, pss);
        }
    }
    if plan.wants("udp") {
        for pace in PACES {
            datagrams(plan, &pair, contender, Some(pace), report);
        }
        datagrams(plan, &pair, contender, None, report);
    }
    if plan.wants("rtt") {
        let load = Tcp {
            streams: 1,
            time: time + Duration::from_secs(1),
            congestion: DEFAULT,
            back: false,
        };
        let times = thread::scope(|scope| {
            let loading = scope.spawn(|| load.run(&pair.near, &pair.far));
            // The stream is at its height.
            thread::sleep(Duration::from_secs(1));
            let times = traffic::pings(&pair.near, &pair.far, time);
            loading.join().expect("the load").unwrap();
            times.unwrap()
        });
        add_times(contender, "rtt/loaded", &times, report);
    }
    // Without a tunnel there are no datagrams.
    if plan.wants("single") && contender != Contender::Veth {
        pair.forbid_trains();
        streams(plan, &pair, contender, "single", DEFAULT, report);
    }
}

/// Two containers of one host.
pub fn on_one_host(plan: &Plan, contender: Contender, report: &mut Report) {
    let pair = Pair::start_on_one_host(contender);
    for (name, congestion) in [("local/default", DEFAULT), ("local/cubic", CUBIC)] {
        let load = Tcp {
            streams: 1,
            time: plan.time,
            congestion,
            back: false,
        };
        carry(&pair, contender, name, &load, report);
    }
}

fn streams(
    plan: &Plan,
    pair: &Pair,
    contender: Contender,
    name: &str,
    congestion: Option<&'static str>,
    report: &mut Report,
) {
    for streams in [1, 8] {
        let directions: &[bool] = if plan.quick { &[false] } else { &[false, true] };
        for &back in directions {
            let direction = if back { "back" } else { "there" };
            let control = congestion.unwrap_or("default");
            let load = Tcp {
                streams,
                time: plan.time,
                congestion,
                back,
            };
            let name = format!("{name}/{streams}/{direction}/{control}");
            carry(pair, contender, &name, &load, report);
        }
    }
}

fn carry(pair: &Pair, contender: Contender, name: &str, load: &Tcp, report: &mut Report) {
    let daemons = pair.daemons();
    let (before, machine) = (usage::cpu(&daemons), usage::Machine::now());
    let carried = load.run(&pair.near, &pair.far).unwrap();
    let (used, machine_used) = (usage::cpu(&daemons) - before, machine.cpu());
    report.add(contender, name, GBIT, carried.gigabits_per_second());
    if !daemons.is_empty() {
        report.add(contender, name, CPU_PER_GB, used / carried.gigabytes());
    }
    let of_all = machine_used / carried.gigabytes();
    report.add(contender, name, MACHINE_PER_GB, of_all);
}

fn datagrams(
    plan: &Plan,
    pair: &Pair,
    contender: Contender,
    pace: Option<u32>,
    report: &mut Report,
) {
    let daemons = pair.daemons();
    let before = usage::cpu(&daemons);
    let load = Udp {
        rate: pace.map(f64::from),
        time: plan.time,
    };
    let delivered = load.run(&pair.near, &pair.far).unwrap();
    let used = usage::cpu(&daemons) - before;
    let name = pace.map_or("udp/flat-out".to_owned(), |pace| format!("udp/{pace}"));
    let (sent, received) = (delivered.sent as f64, delivered.received as f64);
    assert!(received > 0.0, "{name}: nothing arrived");
    let rate = received / delivered.took.as_secs_f64();
    report.add(contender, &name, PACKETS, rate);
    let lost = 100.0 * (sent - received) / sent;
    report.add(contender, &name, PERCENT_LOST, lost);
    if !daemons.is_empty() {
        report.add(contender, &name, CPU_PER_PACKET, used * 1e6 / received);
    }
}

fn add_times(contender: Contender, name: &str, sorted: &[Duration], report: &mut Report) {
    for percent in [50, 99] {
        let at = sorted[(sorted.len() - 1) * percent / 100];
        let name = format!("{name}/p{percent}");
        report.add(contender, &name, MILLISECONDS, at.as_secs_f64() * 1e3);
    }
}
