//! What a tailnet adds to `podman run` and `docker run`, with the engines themselves in a lab.

use std::{
    env,
    process::{Command, Stdio},
};

use crate::{
    Plan,
    contender::Contender::{Bridge, NamedBridge, Ours, TwoBridges},
    report::{MILLISECONDS, Report},
};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../integration/bench");

/// Runs the same container on bridges and on a tailnet, as a new node and as a known one. A metric
/// is `engine/START/FIGURE/ENGINE`; those of the parts of a start are ours alone.
pub fn overhead(plan: &Plan, report: &mut Report) {
    let rounds = if plan.quick { "3" } else { "15" };
    // target/release/deps/race
    let race = env::current_exe().expect("the bench's own path");
    let programs = race.ancestors().nth(2).expect("the target directory");
    let output = Command::new(SCRIPT)
        .arg(rounds)
        .env("TAILNODE_BIN", programs)
        .stderr(Stdio::inherit())
        .output()
        .unwrap_or_else(|error| panic!("{SCRIPT}: {error}"));
    assert!(output.status.success(), "{SCRIPT}: {}", output.status);
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        add(line, report).unwrap_or_else(|| panic!("{SCRIPT} said: {line}"));
    }
}

/// Takes a line: engine, network, figure and milliseconds.
fn add(line: &str, report: &mut Report) -> Option<()> {
    let words: Vec<_> = line.split_whitespace().collect();
    let [engine, network, figure, time] = words[..] else {
        return None;
    };
    let engine = ["podman", "docker"].into_iter().find(|it| *it == engine)?;
    // A bridge is what all starts of its engine are compared with.
    let all: &[_] = match engine {
        "docker" => &["cold", "known", "known-internal"],
        _ => &["cold", "known"],
    };
    let (contender, starts) = match network {
        "bridge" => (Bridge(engine), all),
        "named-bridge" => (NamedBridge(engine), all),
        "two-bridges" => (TwoBridges(engine), all),
        start => {
            let at = all.iter().position(|it| *it == start)?;
            (Ours, &all[at..=at])
        }
    };
    let time = time.parse().ok()?;
    for start in starts {
        let metric = format!("engine/{start}/{figure}/{engine}");
        report.add(contender, &metric, MILLISECONDS, time);
    }
    Some(())
}
