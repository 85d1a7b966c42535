//! Our nodes and the programs of others: Tailscale's client, Headscale, Tailscale's test server.
//!
//! `make interop` runs this. It prints a line a case, writes target/interop.json, and fails when a
//! case does. A case that failed beside others is tried once more by itself, and its line says so.
//! Words after the program's name choose the cases whose names begin with them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a case reports by panicking, and not only in its own body"
)]

mod bytes;
mod direct;
mod join;
mod life;
mod lock;
mod names;
mod policy;
mod relay;
mod routes;
mod scene;
mod wire;

use std::{
    any::Any,
    collections::BTreeMap,
    env, fs,
    process::ExitCode,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use self::scene::{Case, Server};

/// All cases, a file a group.
const GROUPS: &[&[Case]] = &[
    join::CASES,
    direct::CASES,
    relay::CASES,
    wire::CASES,
    names::CASES,
    policy::CASES,
    routes::CASES,
    bytes::CASES,
    life::CASES,
    lock::CASES,
];

/// Cases that would begin later than this do not, and have failed.
const LIMIT: Duration = Duration::from_secs(30 * 60);
/// Cases that run at once: each waits for most of its time.
const JOBS: usize = 3;

/// A case under one server.
struct Run {
    name: String,
    server: Server,
    case: fn(Server),
}

fn main() -> ExitCode {
    let chosen: Vec<String> = env::args().skip(1).collect();
    let all = GROUPS.iter().copied().flatten();
    let mut runs: Vec<Run> = all
        .flat_map(|&(name, servers, case)| {
            servers.iter().map(move |&server| Run {
                name: format!("{name}/{server}"),
                server,
                case,
            })
        })
        .collect();
    let unknown = |prefix: &&String| runs.iter().all(|run| !run.name.starts_with(*prefix));
    if let Some(prefix) = chosen.iter().find(unknown) {
        println!("no case begins with {prefix}");
        return ExitCode::FAILURE;
    }
    let is_chosen = |run: &Run| chosen.iter().any(|prefix| run.name.starts_with(prefix));
    runs.retain(|run| chosen.is_empty() || is_chosen(run));

    let began = Instant::now();
    let next = AtomicUsize::new(0);
    let results = Mutex::new(BTreeMap::new());
    thread::scope(|scope| {
        for _ in 0..JOBS {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(run) = runs.get(number) else {
                        return;
                    };
                    let outcome = run.outcome(began);
                    run.tell(&outcome);
                    results.lock().unwrap().insert(number, outcome);
                }
            });
        }
    });
    let results = results.into_inner().unwrap();
    let results: Vec<Value> = runs
        .iter()
        .zip(results.into_values())
        .map(|(run, first)| run.result(first, began))
        .collect();
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

impl Run {
    /// Runs it: how long it took, or what failed.
    fn outcome(&self, began: Instant) -> Result<String, String> {
        if began.elapsed() >= LIMIT {
            return Err("not begun: the time was up".to_owned());
        }
        eprintln!("=== {}", self.name);
        let started = Instant::now();
        let (case, server) = (self.case, self.server);
        // A thread's end is the end of all that it started.
        let thread = thread::Builder::new().name(self.name.clone());
        let thread = thread.spawn(move || case(server)).unwrap();
        thread.join().map_err(|panic| words(&*panic))?;
        Ok(format!("{:.1} s", started.elapsed().as_secs_f32()))
    }

    /// Its last word as JSON: a machine that is busy with other cases may make one late.
    fn result(&self, first: Result<String, String>, began: Instant) -> Value {
        let outcome = first.or_else(|failure| {
            let again = self
                .outcome(began)
                .map(|took| format!("{took}, by itself; beside others it failed: {failure}"));
            self.tell(&again);
            again
        });
        let ok = outcome.is_ok();
        let (Ok(detail) | Err(detail)) = outcome;
        json!({ "case": self.name, "ok": ok, "detail": detail })
    }

    fn tell(&self, outcome: &Result<String, String>) {
        let word = if outcome.is_ok() { "ok    " } else { "FAILED" };
        let (Ok(detail) | Err(detail)) = outcome;
        println!("{word} {}: {detail}", self.name);
    }
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("it panicked without words").to_owned()
}
