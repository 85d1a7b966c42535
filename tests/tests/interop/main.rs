//! Our nodes and the programs of others: Tailscale's client, Headscale, Tailscale's test server.
//!
//! `make interop` runs this. It prints a line a case, writes target/interop.json, and fails when a
//! case does. Words after the program's name choose the cases whose names begin with them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a case reports by panicking, and not only in its own body"
)]

mod direct;
mod join;
mod life;
mod lock;
mod names;
mod policy;
mod relay;
mod scene;
mod wire;

use std::{
    any::Any,
    env, fs,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use self::scene::Case;

/// All cases, a file a group.
const GROUPS: &[&[Case]] = &[
    join::CASES,
    direct::CASES,
    relay::CASES,
    wire::CASES,
    names::CASES,
    policy::CASES,
    life::CASES,
    lock::CASES,
];

/// Cases that would begin later than this do not, and have failed.
const LIMIT: Duration = Duration::from_secs(15 * 60);

fn main() -> ExitCode {
    let chosen: Vec<String> = env::args().skip(1).collect();
    let began = Instant::now();
    let mut results = Vec::new();
    for &(name, servers, case) in GROUPS.iter().copied().flatten() {
        for &server in servers {
            let name = format!("{name}/{server}");
            if !chosen.is_empty() && !chosen.iter().any(|prefix| name.starts_with(prefix)) {
                continue;
            }
            let started = Instant::now();
            let outcome = if began.elapsed() < LIMIT {
                eprintln!("=== {name}");
                // A thread's end is the end of all that it started.
                let run = thread::spawn(move || case(server));
                run.join().map_err(|panic| words(&*panic))
            } else {
                Err("not begun: the time was up".to_owned())
            };
            let ok = outcome.is_ok();
            let took = format!("{:.1} s", started.elapsed().as_secs_f32());
            let detail = outcome.err().unwrap_or(took);
            println!("{} {name}: {detail}", if ok { "ok    " } else { "FAILED" });
            results.push(json!({ "case": name, "ok": ok, "detail": detail }));
        }
    }
    let unknown = |prefix: &&String| {
        let mut results = results.iter();
        !results.any(|result| {
            result["case"]
                .as_str()
                .is_some_and(|name| name.starts_with(*prefix))
        })
    };
    if let Some(prefix) = chosen.iter().find(unknown) {
        println!("no case begins with {prefix}");
        return ExitCode::FAILURE;
    }
    let failed = results
        .iter()
        .filter(|result| result["ok"] == false)
        .count();
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/interop.json");
    fs::write(file, format!("{:#}\n", Value::from(results.clone()))).unwrap();
    println!("{} cases, {failed} failed", results.len());
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("it panicked without words").to_owned()
}
