//! The daemon `tailnoded`.

use std::{
    io::{self, IsTerminal},
    process::ExitCode,
};

use anyhow::Context;
use clap::Parser;
use rustix::{fs::Mode, process::umask};
use tailnode_plugin::{
    activation,
    daemon::{self, Settings},
    inside,
};
use tracing_subscriber::EnvFilter;

fn main() -> anyhow::Result<ExitCode> {
    if inside::is_child() {
        return Ok(inside::child());
    }
    let settings = Settings::parse();
    let activated = activation::socket().context("the socket that systemd hands over")?;
    // Before anything is made: keys and sockets are their owner's alone.
    umask(Mode::from_raw_mode(0o077));
    let filter = match std::env::var(EnvFilter::DEFAULT_ENV) {
        Ok(wanted) => EnvFilter::builder().parse_lossy(wanted),
        Err(_) => EnvFilter::new("info"),
    };
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal());
    // The journal has a clock of its own.
    match std::env::var_os("JOURNAL_STREAM") {
        Some(_) => log.without_time().init(),
        None => log.init(),
    }
    // For requests; packets have threads of their own.
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(daemon::run(settings, activated))
        .context("tailnoded")?;
    Ok(ExitCode::SUCCESS)
}
