//! `tailscale`, the netavark plugin through which a Podman container gets its node.
//!
//! Podman and netavark run it for every container that starts or stops, and hold a lock over all
//! containers meanwhile. So it does the little that must happen on the caller's side of the daemon
//! (making the device, where the container's namespace can be reached) and leaves at once. It
//! starts no process: one that inherited standard output would keep netavark waiting.

mod contract;

use std::{
    env,
    ffi::OsStr,
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    process::{self, ExitCode},
    time::Duration,
};

use contract::{API_VERSION, Attachment, NewNetwork, StatusBlock};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;
use tailnode_plugin::{
    Error,
    api::{self, Asked, Request, Response},
    options::Layer,
};
use tailnode_tun::Netns;

/// The container's devices are tailscale0, tailscale1 and so on, one a tailnet.
const DEVICE_PREFIX: &str = "tailscale";

/// the daemon answers an attach within 8 s, with an error if it must. The engine's other starts
/// wait for this one, so 10 s is all that a start may take.
const ATTACH_TIMEOUT: Duration = Duration::from_millis(8_600);
const CREATE_TIMEOUT: Duration = Duration::from_secs(2);
const DETACH_TIMEOUT: Duration = Duration::from_secs(6);
const CLEAN_UP_TIMEOUT: Duration = Duration::from_millis(500);

const OTHER_VERSION: &str = "tailnoded answered another question: it and this plugin are of \
                             different versions; restart it with `systemctl restart tailnoded`";

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    let arguments: Vec<&OsStr> = arguments.iter().map(AsRef::as_ref).collect();
    let result = match arguments.as_slice() {
        [command] if *command == "create" => input().and_then(create).and_then(print),
        [command, netns] if *command == "setup" => input()
            .and_then(|attachment| setup(Path::new(netns), &attachment))
            .and_then(print),
        [command, _netns] if *command == "teardown" => {
            input().map(|attachment| teardown(&attachment))
        }
        [command] if *command == "info" => {
            print(json!({ "version": env!("CARGO_PKG_VERSION"), "api_version": API_VERSION }))
        }
        _ => Err("Podman runs this program by itself: use \
                  `podman network create -d tailscale NAME`, then \
                  `podman run --network NAME IMAGE`"
            .into()),
    };
    let Err(message) = result else {
        return ExitCode::SUCCESS;
    };
    // The engine shows the reader of its terminal what comes in this field, and nothing else.
    if let Err(lost) = print(json!({ "error": format!("tailscale: {message}") })) {
        eprintln!("tailscale: {message} ({lost})");
    }
    ExitCode::FAILURE
}

/// `podman network create -d tailscale`: refuses what no container could use later, as far as that
/// can be told: a network can be created while the daemon is down.
fn create(network: NewNetwork) -> Result<NewNetwork, String> {
    let in_network = |message: String| format!("network {}: {message}", network.name());
    if let Some(refusal) = network.refusal() {
        return Err(in_network(refusal.into()));
    }
    // Without serde's own words, here and below: they quote what they fail on, which may
    // be a secret.
    let options = network
        .options()
        .map_err(|_| in_network("its options are no texts: is Podman at least 4.5?".into()))?;
    Layer::of_network(network.name(), &options).map_err(|error| in_network(error.to_string()))?;
    let request = Request::Allows {
        network_name: network.name().to_owned(),
        network_options: options,
    };
    if let Err(Error::Daemon { message }) =
        api::call(&api::socket_path(), &request, None, CREATE_TIMEOUT)
    {
        return Err(in_network(message));
    }
    Ok(network.without_addresses())
}

/// A container starts: makes its device and has the daemon serve it.
fn setup(netns: &Path, attachment: &Attachment) -> Result<StatusBlock, String> {
    let attached = attach(netns, attachment);
    attached.map_err(|message| format!("{}: {message}", subject(attachment)))
}

fn attach(netns: &Path, attachment: &Attachment) -> Result<StatusBlock, String> {
    let netns = Netns::open(netns).map_err(|error| error.to_string())?;
    // Made here and moved, never made inside: a device made inside would keep the namespace alive
    // after the container.
    let name = format!("tn{}", process::id());
    let tun = tailnode_tun::create(&name).map_err(|error| error.to_string())?;
    // The kernel takes its time to move a device; the daemon starts the node meanwhile.
    let asked = ask(tun.as_fd(), attachment)?;
    let moved = tailnode_tun::move_into(&name, &netns, DEVICE_PREFIX);
    let served = match &moved {
        Ok(name) => serve(asked, &netns, name),
        Err(error) => Err(error.to_string()),
    };
    served.inspect_err(|_| {
        // An answer that came too late, or was of no use, may have left a node behind; and a daemon
        // that hangs keeps the device, so to close our descriptor may not be enough.
        let cleaning_up = |error: String| {
            eprintln!("tailscale: {}: cleaning up: {error}", subject(attachment));
        };
        if let Ok(name) = &moved {
            tailnode_tun::remove(&netns, name)
                .unwrap_or_else(|error| cleaning_up(error.to_string()));
        }
        detach(attachment, CLEAN_UP_TIMEOUT).unwrap_or_else(cleaning_up);
    })
}

fn ask(tun: BorrowedFd, attachment: &Attachment) -> Result<Asked, String> {
    let request = Request::Attach {
        container_id: attachment.container_id.clone(),
        container_name: attachment.container_name.clone(),
        network_id: attachment.network.id.clone(),
        network_name: attachment.network.name.clone(),
        network_options: attachment.network.options.clone(),
        endpoint_options: attachment.network_options.options.clone(),
    };
    let asked = api::ask(&api::socket_path(), &request, Some(tun), ATTACH_TIMEOUT);
    asked.map_err(|error| error.to_string())
}

fn serve(asked: Asked, netns: &Netns, device: &str) -> Result<StatusBlock, String> {
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
    Ok(StatusBlock::new(
        device.to_owned(),
        interface.addresses,
        dns_servers,
        search_domains,
    ))
}

/// A container stops. The engine asks for this more than once, and after the container's namespace
/// or the daemon has gone: there is nothing to fail for.
fn teardown(attachment: &Attachment) {
    if let Err(error) = detach(attachment, DETACH_TIMEOUT) {
        eprintln!("tailscale: {}: {error}", subject(attachment));
    }
}

fn detach(attachment: &Attachment, timeout: Duration) -> Result<(), String> {
    let request = Request::Detach {
        container_id: attachment.container_id.clone(),
        network_id: attachment.network.id.clone(),
    };
    match call(&request, None, timeout)? {
        Response::Ok => Ok(()),
        _ => Err(OTHER_VERSION.into()),
    }
}

fn call(request: &Request, fd: Option<BorrowedFd>, timeout: Duration) -> Result<Response, String> {
    api::call(&api::socket_path(), request, fd, timeout).map_err(|error| error.to_string())
}

fn subject(attachment: &Attachment) -> String {
    let name = match attachment.container_name.as_str() {
        "" => &attachment.container_id,
        name => name,
    };
    format!("container {name} on network {}", attachment.network.name)
}

fn input<T: DeserializeOwned>() -> Result<T, String> {
    let mut text = String::new();
    io::stdin()
        .read_to_string(&mut text)
        .map_err(|error| format!("cannot read the engine's request: {error}"))?;
    serde_json::from_str(&text).map_err(|error| {
        format!(
            "cannot understand the engine's request from line {} column {} on: is Podman at least \
             4.5?",
            error.line(),
            error.column()
        )
    })
}

fn print(value: impl Serialize) -> Result<(), String> {
    let mut stdout = io::stdout().lock();
    serde_json::to_writer(&mut stdout, &value)
        .map_err(io::Error::from)
        .and_then(|()| stdout.write_all(b"\n"))
        .and_then(|()| stdout.flush())
        .map_err(|error| format!("cannot answer the engine: {error}"))
}
