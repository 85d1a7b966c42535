//! Changes to a device inside its container's namespace, also for a daemon that may not enter it.
//!
//! A user's daemon has no capability anywhere. But the container's namespace belongs to a user
//! namespace that the same user made, and the kernel gives its maker all capabilities in it to whoever
//! goes in. Only a process of one thread may, so this program starts itself again for each change: the
//! child goes in, makes the change, says how it went, and ends.

use std::{
    env,
    io::{self, stdin},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tailnode_tun::{Interface, Netns};

use crate::{
    Error,
    api::{self, Response},
};

/// The only argument of the child.
pub const COMMAND: &str = "change-device";

/// For a child from its start to its answer, which takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is done to a device, which the other functions of these names do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Change {
    /// [`tailnode_tun::configure`]
    Configure {
        device: String,
        interface: Interface,
    },
    /// [`tailnode_tun::release`]
    Release { device: String, index: u32 },
}

impl Change {
    /// Makes the change in the container's namespace. Blocks.
    pub(crate) fn make(&self, netns: &Netns) -> Result<(), Error> {
        match self.make_here(netns) {
            // Not ours to enter, as we are.
            Err(tailnode_tun::Error::Netns { cause, .. })
                if cause.kind() == io::ErrorKind::PermissionDenied =>
            {
                self.make_by_child(netns)
            }
            made => Ok(made?),
        }
    }

    fn make_here(&self, netns: &Netns) -> Result<(), tailnode_tun::Error> {
        match self {
            Change::Configure { device, interface } => {
                tailnode_tun::configure(netns, device, interface)
            }
            Change::Release { device, index } => tailnode_tun::release(netns, device, *index),
        }
    }

    fn make_by_child(&self, netns: &Netns) -> Result<(), Error> {
        let deadline = Instant::now() + PATIENCE;
        let failed = |cause| Error::Helper { cause };
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let child = Command::new("/proc/self/exe")
            .arg(COMMAND)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .spawn();
        let _child = Ended(child.map_err(failed)?);
        api::send(&ours, self, Some(netns.as_fd()), deadline).map_err(failed)?;
        match api::receive(&ours, deadline).map_err(failed)?.0 {
            Response::Ok => Ok(()),
            Response::Error { message } => Err(Error::Daemon { message }),
            _ => Err(failed(io::ErrorKind::InvalidData.into())),
        }
    }
}

/// A child that is not left behind.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It has answered, or is of no use.
        if let Err(error) = self.0.kill().and_then(|()| self.0.wait()) {
            tracing::warn!("cannot end a process that changes a device: {error}");
        }
    }
}

/// Whether this process is such a child.
pub fn is_child() -> bool {
    env::args_os().skip(1).eq([COMMAND])
}

/// What the child does: one change, which it is told on its standard input. It must have one thread.
pub fn child() -> ExitCode {
    let deadline = Instant::now() + PATIENCE;
    let answered = stdin().as_fd().try_clone_to_owned().and_then(|socket| {
        let socket = UnixStream::from(socket);
        let (change, netns) = api::receive::<Change>(&socket, deadline)?;
        let made = netns.ok_or(Error::NoDevice).and_then(|netns| {
            let netns = Netns::of_descriptor(netns)?;
            netns.enter_owner()?;
            Ok(change.make_here(&netns)?)
        });
        let response = match made {
            Ok(()) => Response::Ok,
            Err(error) => Response::Error {
                message: error.to_string(),
            },
        };
        api::send(&socket, &response, None, deadline)
    });
    match answered {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tailnoded {COMMAND}: {error}: tailnoded starts this by itself");
            ExitCode::FAILURE
        }
    }
}
