//! A container's device: made, taken into its namespace, and served by the daemon.

use std::{net::IpAddr, os::fd::AsFd, process, time::Duration};

use tailnode_plugin::{
    Error,
    api::{self, Asked, Engine, Request, Response},
};
use tailnode_tun::{Interface, Netns};

/// the daemon answers an attach within 8 s, with an error if it must. The engine's other starts
/// wait for this one, so 10 s is all that a start may take.
const ATTACH_TIMEOUT: Duration = Duration::from_millis(8_600);
const DETACH_TIMEOUT: Duration = Duration::from_secs(6);
const CLEAN_UP_TIMEOUT: Duration = Duration::from_millis(500);

const OTHER_VERSION: &str = "tailnoded answered another question: it and this plugin are of \
                             different versions; restart it with `systemctl restart tailnoded`";

/// What a device is to be called in its container.
pub enum Name<'a> {
    /// tailscale0, tailscale1 and so on: the first that is free.
    Numbered,
    /// So, or not at all.
    Exactly(&'a str),
}

/// A container's place on a network, by the daemon's key for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub engine: Engine,
    pub container_id: String,
    pub network_id: String,
}

/// A device that is set up and served.
pub struct Attached {
    pub device: String,
    pub interface: Interface,
    pub dns_servers: Vec<IpAddr>,
    pub search_domains: Vec<String>,
}

/// Makes a device in `netns` and has the daemon serve it by `request`, which is one to attach
/// `place`. When this fails, nothing of it stays behind.
pub fn attach(
    netns: &Netns,
    name: &Name,
    place: &Place,
    request: &Request,
) -> Result<Attached, Box<Error>> {
    // Made here and moved, never made inside: a device made inside would keep the namespace alive
    // after the container.
    let made = format!("tn{}", process::id());
    let tun = tailnode_tun::create(&made).map_err(failed)?;
    // The kernel takes its time to move a device; the daemon starts the node meanwhile.
    let asked = api::ask(
        &api::socket_path(),
        request,
        Some(tun.as_fd()),
        ATTACH_TIMEOUT,
    )?;
    let moved = match name {
        Name::Numbered => tailnode_tun::move_into(&made, netns, "tailscale"),
        Name::Exactly(name) => {
            tailnode_tun::move_as(&made, netns, name).map(|()| (*name).to_owned())
        }
    };
    let device = moved.as_ref().unwrap_or(&made).clone();
    let served = match moved {
        Ok(device) => serve(asked, netns, device),
        Err(error) => Err(failed(error)),
    };
    served.inspect_err(|_| {
        // An answer that came too late, or was of no use, may have left a node behind; and a daemon
        // that hangs keeps the device, so to close our descriptor may not be enough.
        let cleaning_up = |error: Box<Error>| {
            eprintln!(
                "tailscale: container {}: cleaning up: {error}",
                place.container_id
            );
        };
        tailnode_tun::remove(netns, &device).unwrap_or_else(|error| cleaning_up(failed(error)));
        end(place, CLEAN_UP_TIMEOUT).unwrap_or_else(cleaning_up);
    })
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
                Err(also) => Box::new(Error::Daemon {
                    message: format!("{error}; and cleaning up: {also}"),
                }),
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

/// Has the daemon stop the node at `place`, if there is one.
pub fn detach(place: &Place) -> Result<(), Box<Error>> {
    end(place, DETACH_TIMEOUT)
}

fn end(place: &Place, timeout: Duration) -> Result<(), Box<Error>> {
    let request = Request::Detach {
        engine: place.engine,
        container_id: place.container_id.clone(),
        network_id: place.network_id.clone(),
    };
    match call(&request, timeout)? {
        Response::Ok => Ok(()),
        _ => Err(other_version()),
    }
}

/// Asks the daemon.
pub fn call(request: &Request, timeout: Duration) -> Result<Response, Box<Error>> {
    Ok(api::call(&api::socket_path(), request, None, timeout)?)
}

/// For an answer to another question than was asked.
pub fn other_version() -> Box<Error> {
    Box::new(Error::Daemon {
        message: OTHER_VERSION.into(),
    })
}

fn failed(error: tailnode_tun::Error) -> Box<Error> {
    Box::new(error.into())
}
