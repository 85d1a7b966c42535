//! Starting a user's daemon where no systemd does it.
//!
//! Podman runs its plugins in a network namespace of the user's own, out of which no user gets back to
//! the host's. So a daemon that a plugin starts lives in there and reaches the world as the user's
//! containers do, by pasta. It ends with its last node, since Podman ends that namespace with the last
//! container of a network; one that somebody starts on the host's side is found first. Podman's hooks
//! run there, and so does a daemon that one of them starts.

use std::{
    env,
    fs::{DirBuilder, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::{
        fs::{DirBuilderExt, OpenOptionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    net::sockopt::socket_peercred,
    process::{Pid, Signal, kill_process},
};

use tailnode_tun::Netns;

use crate::{Error, api::SOCKET_NAME, owner::Owner};

/// For the daemon to listen.
const PATIENCE: Duration = Duration::from_secs(3);
const LOOK: Duration = Duration::from_millis(5);

/// Of the log of a daemon that no journal takes, in bytes: it begins anew then.
const MAX_LOG: u64 = 1 << 20;

/// Sees to it that somebody listens on a user's socket, where that is not for root or systemd to do.
pub(crate) fn ensure(socket: &Path) -> Result<(), Error> {
    let owner = Owner::here();
    // Whoever names another socket sees to what is behind it.
    if !owner.starts_on_demand() || socket != owner.run_dir().join(SOCKET_NAME) {
        return Ok(());
    }
    let deadline = Instant::now() + PATIENCE;
    let mut started: Option<(Child, PathBuf)> = None;
    let mut ended = false;
    loop {
        let found = peer(socket).map(|daemon| (daemon, Home::of(daemon)));
        match (&found, &mut started) {
            (Some((_, Home::Lasting)), _) => return Ok(()),
            (Some((earlier, Home::Ended)), _) => {
                // It would end by itself a little later. A new one waits until it has.
                if !ended && let Err(error) = kill_process(*earlier, Signal::TERM) {
                    eprintln!("tailscale: cannot end an earlier tailnoded: {error}");
                }
                ended = true;
            }
            // It may be ending, with its last node.
            (Some((_, Home::Borrowed)), _) => {}
            (None, None) => started = Some(start(&owner)?),
            (None, Some((child, log))) => {
                if let Ok(Some(_)) = child.try_wait() {
                    return Err(unstarted(log));
                }
            }
        }
        if Instant::now() >= deadline {
            return Err(match (found, started) {
                (Some((_, Home::Borrowed)), _) => Error::Borrowed,
                (_, Some((_, log))) => unstarted(&log),
                (_, None) => Error::NotRunning {
                    socket: socket.to_owned(),
                },
            });
        }
        thread::sleep(LOOK);
    }
}

/// Who listens on the socket.
fn peer(socket: &Path) -> Option<Pid> {
    let stream = UnixStream::connect(socket).ok()?;
    Some(socket_peercred(&stream).ok()?.pid)
}

/// How long a daemon has a way out.
enum Home {
    /// As long as it runs.
    Lasting,
    /// Podman has ended the network that it was started in, and made another, which this process is in.
    Ended,
    /// As long as Podman needs the network that it was started in, which is not that of this process.
    Borrowed,
}

impl Home {
    fn of(daemon: Pid) -> Home {
        let daemon = format!("/proc/{}/ns/net", daemon.as_raw_nonzero());
        let (Ok(daemon), Ok(here)) = (Netns::open(daemon), Netns::current()) else {
            // The kernel shows it to nobody in a user namespace if it is in none itself.
            return Home::Lasting;
        };
        // Of networks that are not the host's there are only Podman's.
        let is_podmans = |netns: &Netns| netns.is_ours().unwrap_or(false);
        match (is_podmans(&daemon), is_podmans(&here)) {
            _ if daemon.id() == here.id() => Home::Lasting,
            (false, _) => Home::Lasting,
            (true, true) => Home::Ended,
            (true, false) => Home::Borrowed,
        }
    }
}

fn start(owner: &Owner) -> Result<(Child, PathBuf), Error> {
    let program = program();
    let state = owner.state();
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&state)
        .map_err(Error::file("make the directory", &state))?;
    let path = state.join("tailnoded.log");
    let log = open_log(&path).map_err(Error::file("write", &path))?;
    let copy = log.try_clone().map_err(Error::file("write", &path))?;
    // Nothing of ours may stay open in it: the engine reads what we print up to its end.
    let child = Command::new(&program)
        .arg("--on-demand")
        .stdin(Stdio::null())
        .stdout(copy)
        .stderr(log)
        .current_dir("/")
        .spawn()
        .map_err(Error::file("start", &program))?;
    Ok((child, path))
}

/// The daemon that was installed with this program, else the one that is found first.
fn program() -> PathBuf {
    let installed = env::current_exe().ok().and_then(|this| {
        // PREFIX/libexec/netavark/tailscale or PREFIX/libexec/tailnode-hook
        let mut prefixes = this.ancestors().skip(2).take(2);
        prefixes.find_map(|prefix| {
            let program = prefix.join("bin/tailnoded");
            program.exists().then_some(program)
        })
    });
    installed.unwrap_or_else(|| "tailnoded".into())
}

fn open_log(path: &Path) -> io::Result<File> {
    let log = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)?;
    if log.metadata()?.len() > MAX_LOG {
        log.set_len(0)?;
    }
    Ok(log)
}

/// The daemon's own last words say why it did not start.
fn unstarted(log: &Path) -> Error {
    let tail = || {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(4096)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes);
        let last = text.lines().rfind(|line| !line.trim().is_empty());
        Ok::<_, io::Error>(last.unwrap_or("it said nothing").trim().to_owned())
    };
    Error::Unstarted {
        log: log.to_owned(),
        reason: tail().unwrap_or_else(|error| error.to_string()),
    }
}
