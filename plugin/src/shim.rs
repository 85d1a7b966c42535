//! The caller's side of an attach, for the programs that an engine runs: making the device where
//! the container's namespace can be reached, and setting it up when the daemon has answered.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    process,
    time::{Duration, Instant},
};

use tailnode_tun::{Interface, Netns};

use crate::{
    Error,
    api::{self, Asked, Engine, Request, Response},
    interface::PREFIX,
    on_demand,
    owner::Owner,
};

/// The daemon answers an attach within 8 s, with an error if it must. Podman's other starts may wait
/// for this one, so 10 s is all that a start may take, with that of the daemon.
const ATTACH_TIMEOUT: Duration = Duration::from_millis(8_600);
const DETACH_TIMEOUT: Duration = Duration::from_secs(6);
const QUESTION_TIMEOUT: Duration = Duration::from_secs(2);
const CLEAN_UP_TIMEOUT: Duration = Duration::from_millis(500);

/// A container's place on a network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Who asks.
    pub engine: Engine,
    /// The engine's id of the container.
    pub container_id: String,
    /// Its name; where it is empty the daemon asks Podman's database.
    pub container_name: String,
    /// The engine's id of the network.
    pub network_id: String,
    /// Its name.
    pub network_name: String,
    /// The network's options.
    pub network_options: BTreeMap<String, String>,
    /// Those of this container on it.
    pub endpoint_options: BTreeMap<String, String>,
    /// The container's annotations, as far as the caller was told.
    pub annotations: BTreeMap<String, String>,
    /// What the device is to be called in the container, or not to be made; else tailscale0,
    /// tailscale1 and so on, the first that is free.
    pub device: Option<String>,
}

/// A container that has its node, and its device set up.
#[derive(Clone, Debug)]
pub struct Attached {
    /// What the device is called in the container.
    pub device: String,
    /// How it is set up.
    pub interface: Interface,
    /// The node's resolver; none where the container's DNS is to stay as it is.
    pub dns_servers: Vec<IpAddr>,
    /// Domains to complete short names with.
    pub search_domains: Vec<String>,
}

impl Place {
    /// Gives the container in this namespace its node. When this fails, nothing stays behind.
    pub fn attach(&self, netns: &Netns) -> Result<Attached, Box<Error>> {
        let begun = Instant::now();
        // First, because a daemon that is started stays in the network that this process is in.
        on_demand::ensure(&api::socket_path())?;
        if !Netns::current()
            .and_then(|here| here.is_ours())
            .map_err(failed)?
        {
            Netns::enter_new().map_err(failed)?;
        }
        // Made here and moved, never made inside: a device made inside would keep the namespace
        // alive after the container.
        let made = format!("tn{}", process::id());
        let tun = tailnode_tun::create(&made).map_err(failed)?;
        // The kernel takes its time to move a device; the daemon starts the node meanwhile.
        let left = ATTACH_TIMEOUT.saturating_sub(begun.elapsed());
        let asked = self.ask(tun.as_fd(), left)?;
        let moved = match &self.device {
            None => tailnode_tun::move_into(&made, netns, PREFIX),
            Some(name) => tailnode_tun::move_as(&made, netns, name).map(|()| name.clone()),
        };
        let name = moved.as_ref().ok().cloned();
        let served = moved
            .map_err(failed)
            .and_then(|name| serve(asked, netns, name));
        served.map_err(|error| {
            // An answer that came too late, or was of no use, may have left a node behind; and a
            // daemon that hangs keeps the device, so to close our descriptor may not be enough.
            let removed = name.map_or(Ok(()), |name| tailnode_tun::remove(netns, &name));
            match removed
                .map_err(failed)
                .and(self.end(&api::socket_path(), CLEAN_UP_TIMEOUT))
            {
                Ok(()) => error,
                // Why there is no daemon has been said.
                Err(also) if also.to_string() == error.to_string() => error,
                Err(also) => and_cleaning_up(&error, &also),
            }
        })
    }

    /// Stops the container's node, if it has one.
    pub fn detach(&self) -> Result<(), Box<Error>> {
        self.detach_from(&api::socket_path())
    }

    /// The same of the daemon at this socket.
    pub fn detach_from(&self, socket: &Path) -> Result<(), Box<Error>> {
        self.end(socket, DETACH_TIMEOUT)
    }

    /// Whether Podman connects the container to networks, be it later.
    pub fn is_connected(&self) -> Result<bool, Box<Error>> {
        let request = Request::Connects {
            container_id: self.container_id.clone(),
        };
        let socket = api::socket_path();
        on_demand::ensure(&socket)?;
        match api::call(&socket, &request, None, QUESTION_TIMEOUT)? {
            Response::Connects(connects) => Ok(connects),
            _ => Err(other_version()),
        }
    }

    fn ask(&self, tun: BorrowedFd, timeout: Duration) -> Result<Asked, Box<Error>> {
        let place = self.clone();
        let request = Request::Attach {
            engine: place.engine,
            container_id: place.container_id,
            container_name: place.container_name,
            network_id: place.network_id,
            network_name: place.network_name,
            network_options: place.network_options,
            endpoint_options: place.endpoint_options,
            annotations: place.annotations,
        };
        Ok(api::ask(&api::socket_path(), &request, Some(tun), timeout)?)
    }

    fn end(&self, socket: &Path, timeout: Duration) -> Result<(), Box<Error>> {
        let request = Request::Detach {
            engine: self.engine,
            container_id: self.container_id.clone(),
            network_id: self.network_id.clone(),
        };
        match api::call(socket, &request, None, timeout)? {
            Response::Ok => Ok(()),
            _ => Err(other_version()),
        }
    }
}

fn serve(asked: Asked, netns: &Netns, device: String) -> Result<Attached, Box<Error>> {
    let Response::Attached {
        interface,
        dns_servers,
        search_domains,
    } = asked.answer()?
    else {
        return Err(other_version());
    };
    if let Err(error) = tailnode_tun::configure(netns, &device, &interface) {
        return Err(
            match tailnode_tun::release(netns, &device, interface.index) {
                Ok(()) => failed(error),
                Err(also) => and_cleaning_up(&failed(error), &failed(also)),
            },
        );
    }
    Ok(Attached {
        device,
        interface,
        dns_servers,
        search_domains,
    })
}

/// For an answer to another question than was asked.
pub fn other_version() -> Box<Error> {
    Box::new(Error::Daemon {
        message: format!(
            "tailnoded answered another question: it and this program are of different versions; \
             restart it with `systemctl {}restart tailnoded`",
            Owner::here().flag()
        ),
    })
}

fn and_cleaning_up(error: &Error, also: &Error) -> Box<Error> {
    Box::new(Error::Daemon {
        message: format!("{error}; and cleaning up: {also}"),
    })
}

fn failed(error: tailnode_tun::Error) -> Box<Error> {
    Box::new(error.into())
}
