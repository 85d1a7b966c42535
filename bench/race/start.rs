//! From the start of a container to the first byte that it gets over the tailnet.
//!
//! Ours: the plugin is run as Podman runs it, and then the app. Theirs: the daemon starts in the
//! container's namespace, `tailscale up` ends, and then the app, as it does behind a sidecar that
//! has to be healthy first. What an engine needs by itself is in neither.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use tailnode_tests::{Container, Gopher, Host, Underlay};

use crate::{
    Plan,
    contender::Contender,
    machine::{self, Machine, Stopped},
    report::{MILLISECONDS, Report},
    traffic,
};

/// Starts of a round.
const TIMES: usize = 3;
/// What the kernel may take to clean up after an earlier start.
const REST: Duration = Duration::from_millis(500);

/// Containers that the tailnet does not know, and each of them once more.
pub fn until_first_byte(_: &Plan, contender: Contender, report: &mut Report) {
    let underlay = Underlay::new();
    let (mut tailnet, key) = machine::control(&underlay);
    let url = tailnet.url();
    let host = Arc::new(Host::start(&underlay, &tailnet, &key));
    let web = match contender {
        Contender::Tailscaled(release) => {
            machine::gopher(release, &underlay, &tailnet, &key, "web")
        }
        _ => {
            let host = Arc::new(Host::start(&underlay, &tailnet, &key));
            Machine::ours(&host, "web")
        }
    };
    let page = traffic::serve_page(&web).unwrap();
    let mut measure = |how: &str, start: Box<dyn FnOnce() -> Machine + '_>| {
        // The kernel takes devices and namespaces that ended away one at a time, and has one lock for
        // those and for new ones.
        thread::sleep(REST);
        let (begun, begun_at) = (Instant::now(), Utc::now());
        let machine = start();
        let ready = begun.elapsed();
        traffic::get_page(machine.inside(), page).unwrap();
        let first_byte = begun.elapsed();
        let mut phases = vec![
            ("ready", ready),
            ("first-byte", first_byte),
            ("after-ready", first_byte - ready),
        ];
        if contender == Contender::Ours && how != "away" {
            let [node, member] = moments(&host.log(), begun_at);
            phases.extend([
                ("ready/plugin-and-device", node),
                ("ready/join", member.saturating_sub(node)),
                ("ready/interface", ready.saturating_sub(member)),
            ]);
        }
        for (phase, time) in phases {
            let name = format!("start/{how}/{phase}");
            report.add(contender, &name, MILLISECONDS, time.as_secs_f64() * 1e3);
        }
        machine
    };
    let mut machines = Vec::new();
    for number in 0..TIMES {
        let name = format!("app{number}");
        // Made before the clock runs: the engine makes it, with either way.
        let cold: Box<dyn FnOnce() -> Machine> = match contender {
            Contender::Tailscaled(release) => {
                let namespace = underlay.host();
                let (url, key, name) = (&url, &key, &name);
                Box::new(move || {
                    let joined = Gopher::join_as(release, namespace, url, key, name);
                    Machine::tailscaled(joined.unwrap())
                })
            }
            _ => {
                let container = Container::new(&name);
                Box::new(|| Machine::attach(&host, container))
            }
        };
        let machine = measure("cold", cold);
        let known: Box<dyn FnOnce() -> Machine> = match machine.stop().expect("a node") {
            Stopped::Ours(host, container) => {
                let container = container.started_again();
                Box::new(move || Machine::attach(&host, container))
            }
            Stopped::Tailscaled(gopher) => Box::new(|| {
                let joined = gopher.started_again(&url, &key, &name);
                Machine::tailscaled(joined.unwrap())
            }),
        };
        machines.push(measure("known", known));
    }
    if contender != Contender::Ours {
        return;
    }
    // Nobody answers, and the last map must do.
    tailnet.stop();
    for machine in machines {
        let Some(Stopped::Ours(host, container)) = machine.stop() else {
            unreachable!("ours");
        };
        let container = container.started_again();
        measure("away", Box::new(move || Machine::attach(&host, container)));
    }
}

/// When, after it was begun, our daemon started the node and the node was a member of its tailnet.
fn moments(log: &str, begun: DateTime<Utc>) -> [Duration; 2] {
    let since = |words: &str| {
        log.lines()
            .filter(|line| line.contains(words))
            .filter_map(|line| {
                line.split_whitespace()
                    .next()?
                    .parse::<DateTime<Utc>>()
                    .ok()
            })
            .find_map(|at| (at - begun).to_std().ok())
            .unwrap_or_else(|| panic!("the daemon did not log: {words}"))
    };
    [since("starting a node"), since("control login=Running")]
}
