//! The caller's side of an attach, for the programs that an engine runs: making the device where
//! the container's namespace can be reached, and setting it up when the daemon has answered.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    process,
    time::Duration,
};

use tailnode_tun::{Interface, Netns};

use crate::{
    api::{self, Asked, Request, Response},
    interface::PREFIX,
};

/// The daemon answers an attach within 8 s, with an error if it must. Podman's other starts may wait
/// for this one, so 10 s is all that a start may take.
const ATTACH_TIMEOUT: Duration = Duration::from_millis(8_600);
const DETACH_TIMEOUT: Duration = Duration::from_secs(6);
const CLEAN_UP_TIMEOUT: Duration = Duration::from_millis(500);

const OTHER_VERSION: &str = "tailnoded answered another question: it and this program are of \
                             different versions; restart it with `systemctl restart tailnoded`";

/// A container's place on a network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
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
    /// Gives the container in the namespace at this path its node. When this fails, nothing stays
    /// behind.
    pub fn attach(&self, netns: &Path) -> Result<Attached, String> {
        let netns = Netns::open(netns).map_err(|error| error.to_string())?;
        // Made here and moved, never made inside: a device made inside would keep the namespace
        // alive after the container.
        let name = format!("tn{}", process::id());
        let tun = tailnode_tun::create(&name).map_err(|error| error.to_string())?;
        // The kernel takes its time to move a device; the daemon starts the node meanwhile.
        let asked = self.ask(tun.as_fd())?;
        let moved = tailnode_tun::move_into(&name, &netns, PREFIX);
        let served = match &moved {
            Ok(name) => serve(asked, &netns, name),
            Err(error) => Err(error.to_string()),
        };
        served.map_err(|error| {
            // An answer that came too late, or was of no use, may have left a node behind; and a
            // daemon that hangs keeps the device, so to close our descriptor may not be enough.
            let removed = moved.map_or(Ok(()), |name| tailnode_tun::remove(&netns, &name));
            let removed = removed.map_err(|error| error.to_string());
            match removed.and(self.detach_within(CLEAN_UP_TIMEOUT)) {
                Ok(()) => error,
                // Why there is no daemon has been said.
                Err(also) if also == error => error,
                Err(also) => format!("{error}; and cleaning up: {also}"),
            }
        })
    }

    /// Stops the container's node, if it has one.
    pub fn detach(&self) -> Result<(), String> {
        self.detach_within(DETACH_TIMEOUT)
    }

    fn ask(&self, tun: BorrowedFd) -> Result<Asked, String> {
        let place = self.clone();
        let request = Request::Attach {
            container_id: place.container_id,
            container_name: place.container_name,
            network_id: place.network_id,
            network_name: place.network_name,
            network_options: place.network_options,
            endpoint_options: place.endpoint_options,
            annotations: place.annotations,
        };
        let asked = api::ask(&api::socket_path(), &request, Some(tun), ATTACH_TIMEOUT);
        asked.map_err(|error| error.to_string())
    }

    fn detach_within(&self, timeout: Duration) -> Result<(), String> {
        let request = Request::Detach {
            container_id: self.container_id.clone(),
            network_id: self.network_id.clone(),
        };
        let response = api::call(&api::socket_path(), &request, None, timeout);
        match response.map_err(|error| error.to_string())? {
            Response::Ok => Ok(()),
            _ => Err(OTHER_VERSION.into()),
        }
    }
}

fn serve(asked: Asked, netns: &Netns, device: &str) -> Result<Attached, String> {
    let response = asked.answer().map_err(|error| error.to_string())?;
    let Response::Attached {
        interface,
        dns_servers,
        search_domains,
    } = response
    else {
        return Err(OTHER_VERSION.into());
    };
    if let Err(error) = tailnode_tun::configure(netns, device, &interface) {
        return match tailnode_tun::release(netns, device, interface.index) {
            Ok(()) => Err(error.to_string()),
            Err(also) => Err(format!("{error}; and cleaning up: {also}")),
        };
    }
    Ok(Attached {
        device: device.to_owned(),
        interface,
        dns_servers,
        search_domains,
    })
}
