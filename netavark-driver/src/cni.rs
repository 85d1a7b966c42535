//! The plugin as runtimes of the Container Network Interface run it: for Kubernetes, containerd,
//! CRI-O and Nomad.
//!
//! Alone it makes the interface that the runtime names. Behind another plugin, in a chain, it makes
//! `tailscale0` beside what is there, and the container keeps its first address.

mod contract;

use std::{
    env,
    io::{self, Read},
    process::ExitCode,
    time::Duration,
};

use contract::{Attachment, Code, Command, Failure, Network};
use serde_json::Value;
use tailnode_plugin::{
    Error,
    api::{self, Request, Response, Served},
    shim::{Place, other_version},
};
use tailnode_tun::Netns;

use crate::print;

const QUESTION_TIMEOUT: Duration = Duration::from_secs(2);
/// Nodes that log out take at most three seconds, all at once.
const COLLECT_TIMEOUT: Duration = Duration::from_secs(6);

/// Does what `CNI_COMMAND` says.
pub fn run(command: &str) -> ExitCode {
    let done = read(command).and_then(|command| {
        let (version, about) = command.subject();
        obey(command).map_err(|failure| {
            let failure = failure.in_version(&version);
            if about.is_empty() {
                failure
            } else {
                failure.about(&about)
            }
        })
    });
    let (printed, code) = match done {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(result)) => (print(result), ExitCode::SUCCESS),
        Err(failure) => (print(failure), ExitCode::FAILURE),
    };
    match printed {
        Ok(()) => code,
        Err(lost) => {
            eprintln!("tailscale: {lost}");
            ExitCode::FAILURE
        }
    }
}

fn read(command: &str) -> Result<Command, Failure> {
    let mut input = Vec::new();
    io::stdin().read_to_end(&mut input).map_err(|error| {
        let msg = format!("cannot read the network's configuration: {error}");
        Failure::new(Code::Io, msg)
    })?;
    let variable = |name: &str| env::var_os(name).map(|it| it.to_string_lossy().into_owned());
    Command::read(command, variable, &String::from_utf8_lossy(&input))
}

/// Returns what is to be printed.
fn obey(command: Command) -> Result<Option<Value>, Failure> {
    match command {
        Command::Add(network, attachment) => add(&network, &attachment).map(Some),
        Command::Del(network, attachment) => {
            // Runtimes ask for this more than once, and after the namespace or the daemon has gone:
            // there is nothing to fail for.
            let place = network.place(attachment.container_id.clone(), &attachment.ifname);
            if let Err(error) = place.detach() {
                eprintln!("tailscale: {}: {error}", subject(&network, &attachment));
            }
            Ok(None)
        }
        Command::Check(network, attachment) => check(&network, &attachment).map(|()| None),
        Command::Gc(network, owned) => collect(network, owned).map(|()| None),
        Command::Status(network) => status(network).map(|()| None),
        Command::Version(asked) => Ok(Some(contract::versions(&asked))),
    }
}

fn add(network: &Network, attachment: &Attachment) -> Result<Value, Failure> {
    let netns = open(attachment)?;
    let place = network.place_of(attachment);
    if let Some(Served { device, .. }) = served(&place)? {
        let msg = format!(
            "it is attached already, by {device}: the runtime must ask for DEL before another ADD"
        );
        return Err(Failure::new(Code::Attached, msg));
    }
    let attached = place.attach(&netns)?;
    network
        .result(&attachment.netns, &attached)
        .inspect_err(|_| {
            if let Err(error) = place.detach() {
                eprintln!("tailscale: cleaning up: {error}");
            }
        })
}

fn check(network: &Network, attachment: &Attachment) -> Result<(), Failure> {
    let missing = |msg: String| Failure::new(Code::Missing, msg);
    let netns = open(attachment)?;
    let place = network.place(attachment.container_id.clone(), &attachment.ifname);
    // Nodes do not outlive the daemon, nor their devices: without it there is nothing to try again.
    let served = served(&place).map_err(|failure| failure.with(Code::Missing))?;
    let Some(Served { device, interface }) = served else {
        return Err(missing(
            "it has no node: tailnoded was restarted, or the node was ended; start it again".into(),
        ));
    };
    let told = network.addresses(&device)?;
    if let Some(gone) = told.iter().find(|it| !interface.addresses.contains(it)) {
        return Err(missing(format!(
            "its address on the tailnet is not {gone} any more"
        )));
    }
    match tailnode_tun::missing(&netns, &device, &interface) {
        Ok(None) => Ok(()),
        Ok(Some(what)) => Err(missing(format!("{device}: {what}"))),
        Err(error) => Err(missing(error.to_string())),
    }
}

fn collect(network: Network, owned: Vec<Place>) -> Result<(), Failure> {
    let owned = owned.into_iter();
    let request = Request::Collect {
        network_name: network.name,
        owned: owned.map(|it| (it.container_id, it.network_id)).collect(),
    };
    match call(&request, COLLECT_TIMEOUT) {
        Ok(Response::Ok) => Ok(()),
        Ok(_) => Err(other_version().into()),
        // Without the daemon there are no nodes.
        Err(error) if matches!(*error, Error::NotRunning { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Whether a container could be attached now, as far as can be told without one.
fn status(network: Network) -> Result<(), Failure> {
    let request = Request::Allows {
        network_name: network.name,
        network_options: network.options,
    };
    match call(&request, QUESTION_TIMEOUT) {
        Ok(Response::Ok) => Ok(()),
        Ok(_) => Err(Failure::from(other_version()).with(Code::Unavailable)),
        Err(error) => Err(Failure::from(error).with(Code::Unavailable)),
    }
}

fn served(place: &Place) -> Result<Option<Served>, Failure> {
    let request = Request::Serves {
        engine: place.engine,
        container_id: place.container_id.clone(),
        network_id: place.network_id.clone(),
    };
    match call(&request, QUESTION_TIMEOUT)? {
        Response::Served(served) => Ok(served),
        _ => Err(other_version().into()),
    }
}

fn open(attachment: &Attachment) -> Result<Netns, Failure> {
    let netns = Netns::open(&attachment.netns)?;
    if netns.id() == Netns::current()?.id() {
        let msg = "CNI_NETNS is the host's network namespace: a container must have its own";
        return Err(Failure::new(Code::Environment, msg));
    }
    Ok(netns)
}

fn subject(network: &Network, attachment: &Attachment) -> String {
    format!(
        "container {} on network {}",
        attachment.name(),
        network.name
    )
}

impl Command {
    /// The version to answer in, and whom an error is about.
    fn subject(&self) -> (String, String) {
        match self {
            Command::Add(network, attachment)
            | Command::Del(network, attachment)
            | Command::Check(network, attachment) => {
                (network.version.clone(), subject(network, attachment))
            }
            Command::Gc(network, _) | Command::Status(network) => {
                (network.version.clone(), format!("network {}", network.name))
            }
            Command::Version(asked) => (asked.clone(), String::new()),
        }
    }
}

fn call(request: &Request, timeout: Duration) -> Result<Response, Box<Error>> {
    Ok(api::call(&api::socket_path(), request, None, timeout)?)
}
