//! Giving a network its auth key, and waiting for a person who logs in.

use std::{
    collections::BTreeSet,
    io::{self, IsTerminal, Read, Write},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use tailnode_node::{AuthKey, Login, Secret};
use tailnode_plugin::{
    api::{ContainerStatus, Request},
    secrets::MAX_KEY,
};

use crate::{nodes, status::printable, tell};

/// How often the nodes are looked at.
const LOOK: Duration = Duration::from_millis(500);

/// Takes an auth key for a network, or has the one that is kept forgotten.
pub fn give(network: String, remove: bool) -> anyhow::Result<()> {
    if remove {
        return tell(Request::Login { network, key: None });
    }
    let key = if io::stdin().is_terminal() {
        ask(&format!("Auth key for network {network}: "))?
    } else {
        let mut text = String::new();
        let read = io::stdin().take(MAX_KEY + 1).read_to_string(&mut text);
        if read.context("cannot read the auth key")? as u64 > MAX_KEY {
            bail!("what came is too long to be an auth key");
        }
        Secret::new(text)
    };
    // Before the daemon is troubled with it.
    AuthKey::parse(key.expose()).context("this is no auth key")?;
    tell(Request::Login {
        network: network.clone(),
        key: Some(key),
    })?;
    eprintln!(
        "Kept: containers that start on network {network} from now on join with it. One that waits \
         for a login must be restarted."
    );
    Ok(())
}

/// Waits until nobody must log in for a container, or for any. Tells which pages are to be opened.
pub fn wait(container: Option<&str>, timeout: Option<Duration>) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut told = BTreeSet::new();
    loop {
        let list = nodes(container)?;
        let mut waiting = Vec::new();
        for status in &list {
            if let Some(what) = awaited(status)? {
                if told.insert(what.clone()) {
                    eprintln!("{}", printable(&what));
                }
                waiting.push(status.container.as_str());
            }
        }
        if waiting.is_empty() {
            return Ok(());
        }
        if let Some(timeout) = timeout
            && began.elapsed() >= timeout
        {
            bail!(
                "not let in within {} s: {}",
                timeout.as_secs(),
                waiting.join(", ")
            );
        }
        thread::sleep(LOOK);
    }
}

/// What a node still waits for; an error if it is nothing that a person can do at a page.
fn awaited(status: &ContainerStatus) -> anyhow::Result<Option<String>> {
    let (container, network) = (&status.container, &status.network);
    let on = format!("{container} on {network}");
    Ok(match &status.node.login {
        Login::Running => None,
        Login::NeedsLogin { url, .. } => Some(format!("{on}: open {url}")),
        Login::NeedsApproval => Some(format!(
            "{on}: an administrator of {} must approve it",
            status.node.login_server
        )),
        Login::Starting | Login::Offline { .. } | Login::Expired => Some(format!(
            "{on}: {} is not heard yet",
            status.node.login_server
        )),
        Login::Refused { error } => bail!("{on} was refused: {}", printable(error)),
        Login::Stopped => bail!("{on} has left the tailnet: restart the container to join again"),
    })
}

/// Asks for a secret at the terminal, which does not show it.
fn ask(prompt: &str) -> anyhow::Result<Secret> {
    let _hidden = Hidden::begin().context("cannot hide what is typed")?;
    let mut out = io::stderr();
    write!(out, "{prompt}")?;
    out.flush()?;
    let line = read_line(io::stdin());
    writeln!(out)?;
    Ok(Secret::new(line.context("cannot read the auth key")?))
}

/// Reads what is typed up to the end of the line, minding the keys that the terminal passes on now.
fn read_line(mut input: impl Read) -> io::Result<String> {
    const INTERRUPT: u8 = 3;
    const END: u8 = 4;
    const BACKSPACE: u8 = 8;
    const KILL: u8 = 21;
    const DELETE: u8 = 127;
    let mut line = Vec::new();
    let mut byte = [0];
    while input.read(&mut byte)? == 1 {
        match byte[0] {
            b'\r' | b'\n' | END => break,
            INTERRUPT => return Err(io::Error::other("interrupted")),
            BACKSPACE | DELETE => {
                line.pop();
            }
            KILL => line.clear(),
            _ if line.len() as u64 == MAX_KEY => {
                return Err(io::Error::other("it is too long to be one"));
            }
            other => line.push(other),
        }
    }
    String::from_utf8(line).map_err(|_| io::Error::other("it is no text"))
}

/// A terminal that shows nothing of what is typed, and leaves even Ctrl-C to us: a signal would
/// leave it so.
struct Hidden(Termios);

impl Hidden {
    fn begin() -> io::Result<Hidden> {
        let before = tcgetattr(io::stdin())?;
        let mut hidden = before.clone();
        hidden.local_modes -= LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG;
        tcsetattr(io::stdin(), OptionalActions::Flush, &hidden)?;
        Ok(Hidden(before))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        if let Err(error) = tcsetattr(io::stdin(), OptionalActions::Flush, &self.0) {
            eprintln!(
                "tailnode: cannot make the terminal show what is typed ({error}): run `stty sane`"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_as_it_was_meant() {
        for (typed, line) in [
            ("tskey\r", "tskey"),
            ("tskeX\x7fy\n ignored", "tskey"),
            ("wrong\x15tskey\n", "tskey"),
            ("\x08tskey\x04", "tskey"),
            ("tskey", "tskey"),
            ("", ""),
        ] {
            assert_eq!(read_line(typed.as_bytes()).unwrap(), line, "{typed:?}");
        }
        assert!(read_line("tsk\x03\n".as_bytes()).is_err());
        assert!(read_line("a".repeat(5000).as_bytes()).is_err());
        assert!(read_line(&b"\xff\n"[..]).is_err());
    }
}
