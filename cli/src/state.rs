//! Nodes that no container uses: moving them to other hosts, and forgetting them.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, IsTerminal, Seek},
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use rustix::fs::{MemfdFlags, memfd_create};
use tailnode_plugin::api::{self, Request, Response};

use crate::OTHER_ANSWER;

/// For a control server to be told, and for a disk that takes its time.
const PATIENCE: Duration = Duration::from_secs(20);

pub fn forget(node: String, network: Option<String>, local: bool) -> anyhow::Result<()> {
    let request = Request::Forget {
        node,
        network,
        local,
    };
    ask(&request, None).map(|_| ())
}

pub fn export(node: String, network: Option<String>, path: &Path) -> anyhow::Result<()> {
    let standard = path == Path::new("-");
    if standard && io::stdout().is_terminal() {
        bail!(
            "the node's keys do not belong on a terminal: name a file, or send them to a program"
        );
    }
    let file = match standard {
        true => None,
        false => Some(create(path)?),
    };
    let write = || -> anyhow::Result<_> {
        let mut moving = memory()?;
        let done = ask(&Request::Export { node, network }, Some(&moving))?;
        moving.rewind()?;
        match file.as_ref() {
            Some(mut file) => {
                io::copy(&mut moving, &mut file)?;
                file.sync_all()
            }
            None => io::copy(&mut moving, &mut io::stdout()).map(|_| ()),
        }
        .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(done)
    };
    let (network, hostname) = write().inspect_err(|_| {
        if file.is_some() {
            // The first error is the one to tell.
            let _ = fs::remove_file(path);
        }
    })?;
    eprintln!(
        "Whoever has this file is the node {hostname}. A copy stays here: two hosts must never run it \
         both. Once it is imported elsewhere: tailnode forget {hostname} --network {network} --local"
    );
    Ok(())
}

pub fn import(path: PathBuf, network: Option<String>) -> anyhow::Result<()> {
    let mut moving = memory()?;
    let (origin, copied) = match path == Path::new("-") {
        true => (
            PathBuf::from("standard input"),
            io::copy(&mut io::stdin(), &mut moving),
        ),
        false => {
            let file = File::open(&path);
            let copied = file.and_then(|mut file| io::copy(&mut file, &mut moving));
            (path, copied)
        }
    };
    copied.with_context(|| format!("cannot read {}", origin.display()))?;
    moving.rewind()?;
    let (network, hostname) = ask(&Request::Import { network, origin }, Some(&moving))?;
    eprintln!(
        "The next container on network {network} that wants the hostname {hostname} is this node. The \
         host that it comes from must not run it any more."
    );
    Ok(())
}

/// Returns the network and the hostname of the node that it was done to.
fn ask(request: &Request, file: Option<&File>) -> anyhow::Result<(String, String)> {
    let file = file.map(File::as_fd);
    match api::call(&api::socket_path(), request, file, PATIENCE)? {
        Response::Node { network, hostname } => Ok((network, hostname)),
        _ => bail!(OTHER_ANSWER),
    }
}

/// A file that is on no disk: the daemon never waits for what is slow at the other end.
fn memory() -> anyhow::Result<File> {
    let file = memfd_create("tailnode", MemfdFlags::CLOEXEC);
    Ok(file.context("cannot make a file in memory")?.into())
}

fn create(path: &Path) -> anyhow::Result<File> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot make {}", path.display()))
}
