//! Our node beside its peers, all in one run, in network namespaces: `make bench`.
//!
//! Each round goes through all contenders, beginning with another one each time, and each of them
//! starts anew. What is measured is in the modules, a file a scene; what it is measured against, and
//! what is to be reached, is in [`report`]. It fails when something does not run or when other bytes
//! arrive than were sent, never for a bar.
//!
//! | variable | |
//! |---|---|
//! | `ROUNDS` | how many rounds; 5 |
//! | `LOAD_SECONDS` | how long each load lasts; 8 |
//! | `QUICK=1` | ours and the pinned tailscaled, one round, 3 s, fewer loads and nodes |
//! | `ONLY=tcp,memory` | these scenes: tcp, single, udp, rtt, local, memory, start, netmap, engine |
//! | `CONTENDERS=tailnode,floor` | those whose names begin so |

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a scene reports by panicking"
)]

mod carry;
mod contender;
mod crowd;
mod engine;
mod floor;
mod machine;
mod memory;
mod plot;
mod report;
mod start;
mod traffic;
mod usage;

use std::{
    any::Any,
    env, fs,
    path::Path,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use self::{contender::Contender, report::Report};

/// How much is to be measured.
pub struct Plan {
    /// How long each load lasts.
    pub time: Duration,
    /// Fewer loads and nodes.
    pub quick: bool,
    only: Option<String>,
}

impl Plan {
    /// Whether this scene is wanted.
    pub fn wants(&self, scene: &str) -> bool {
        let only = self.only.as_deref();
        only.is_none_or(|only| only.split(',').any(|word| word == scene))
    }
}

/// Scenes of one contender: each takes a report and adds its figures.
type Scene = (
    &'static [&'static str],
    fn(Contender) -> bool,
    fn(&Plan, Contender, &mut Report),
);

const SCENES: &[Scene] = &[
    (
        &["rtt", "tcp", "udp", "single"],
        |_| true,
        carry::between_hosts,
    ),
    (&["local"], Contender::is_node, carry::on_one_host),
    (&["start"], Contender::is_node, start::until_first_byte),
    (&["memory"], Contender::is_node, memory::of_many_nodes),
    (&["netmap"], Contender::is_node, crowd::among_many_peers),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["floor", container, other] => floor::run(container, other),
        ["plot", json, svg] => plot::draw(Path::new(json), Path::new(svg)),
        // Cargo says --bench.
        [] | ["--bench"] => return race(),
        _ => panic!("race: no arguments, or `plot BENCH.json OUT.svg`"),
    }
    ExitCode::SUCCESS
}

fn race() -> ExitCode {
    let quick = env::var("QUICK").is_ok_and(|value| value == "1");
    let plan = Plan {
        time: Duration::from_secs_f64(number("LOAD_SECONDS").unwrap_or(if quick {
            3.0
        } else {
            8.0
        })),
        quick,
        only: env::var("ONLY").ok(),
    };
    let rounds = number("ROUNDS").map_or(if quick { 1 } else { 5 }, |rounds| rounds as usize);
    let mut contenders = contenders(quick);
    let default = fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").unwrap();
    println!("congestion control of this host: {}", default.trim());

    let began = Instant::now();
    let mut report = Report::default();
    let mut failures = Vec::new();
    for round in 1..=rounds {
        for &contender in &contenders {
            for (names, fits, scene) in SCENES {
                if !fits(contender) || !names.iter().any(|name| plan.wants(name)) {
                    continue;
                }
                let started = Instant::now();
                // A thread's end is the end of all that it started.
                let outcome = thread::scope(|scope| {
                    let running = scope.spawn(|| scene(&plan, contender, &mut report));
                    running.join()
                });
                let took = started.elapsed().as_secs();
                let names = names.join(", ");
                eprintln!("round {round} of {rounds}: {contender}: {names}: {took} s");
                if let Err(panic) = outcome {
                    let failure = format!("{contender}: {names}: {}", words(&*panic));
                    eprintln!("FAILED {failure}");
                    failures.push(failure);
                }
            }
        }
        contenders.rotate_left(1);
    }
    // Of ours alone, and in rounds of its own.
    if plan.wants("engine") && contenders.contains(&Contender::Ours) {
        let started = Instant::now();
        let outcome =
            thread::scope(|scope| scope.spawn(|| engine::overhead(&plan, &mut report)).join());
        eprintln!("engine: {} s", started.elapsed().as_secs());
        if let Err(panic) = outcome {
            let failure = format!("engine: {}", words(&*panic));
            eprintln!("FAILED {failure}");
            failures.push(failure);
        }
    }
    report.print();
    let file = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bench.json"));
    report.write(file);
    println!("\n{rounds} rounds in {} s", began.elapsed().as_secs());
    for failure in &failures {
        println!("FAILED {failure}");
    }
    if failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn contenders(quick: bool) -> Vec<Contender> {
    let chosen = env::var("CONTENDERS").ok();
    let wants = |contender: &Contender| match &chosen {
        Some(chosen) => {
            let name = contender.to_string();
            chosen.split(',').any(|start| name.starts_with(start))
        }
        None => !quick || Contender::QUICK.contains(contender),
    };
    Contender::ALL.into_iter().filter(wants).collect()
}

fn number(variable: &str) -> Option<f64> {
    let text = env::var(variable).ok()?;
    let number = text.parse().ok();
    Some(number.unwrap_or_else(|| panic!("{variable} is to be a number, not {text}")))
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("it panicked without words").to_owned()
}
