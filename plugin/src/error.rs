use std::{io, path::PathBuf};

use crate::{api::Engine, owner::Owner};

/// Why something could not be done, in words for the person at the prompt.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens on the daemon's socket.
    #[error(
        "tailnoded is not running (no answer at {}): {}",
        socket.display(),
        Owner::here().how_to_start()
    )]
    NotRunning {
        /// The daemon's socket.
        socket: PathBuf,
    },

    /// A user's daemon did not start when it was needed.
    #[error(
        "tailnoded, started for this container, does not answer: {reason}; {} says more",
        log.display()
    )]
    Unstarted {
        /// Its log.
        log: PathBuf,
        /// The end of it.
        reason: String,
    },

    /// A user's daemon is in a network that Podman ends before the container.
    #[error(
        "tailnoded was started for containers on Podman's networks, and loses its way out with the last \
         of them: start it by `tailnoded &` before all of them, or stop them first"
    )]
    Borrowed,

    /// The process that enters a container's namespaces for a daemon that may not, failed.
    #[error("cannot change the container's device from within its namespaces: {cause}")]
    Helper {
        /// What happened.
        cause: io::Error,
    },

    /// The socket is there for its owner only.
    #[error("not allowed to talk to tailnoded at {}: run this as root, or as the user whose it is", socket.display())]
    Denied {
        /// The daemon's socket.
        socket: PathBuf,
    },

    /// The daemon took the connection, but no answer came.
    #[error(
        "tailnoded at {} did not answer: {cause}; its log says more: `journalctl {}-u tailnoded`",
        socket.display(),
        Owner::here().flag()
    )]
    Unanswered {
        /// The daemon's socket.
        socket: PathBuf,
        /// What happened instead.
        cause: io::Error,
    },

    /// The daemon answered with an error; these are its words.
    #[error("{message}")]
    Daemon {
        /// What the daemon said.
        message: String,
    },

    /// Podman's database does not say what a container's networks are.
    #[error(
        "cannot read in Podman's database whether container {container_id} has networks; the log \
         of tailnoded says more: `journalctl {}-u tailnoded`",
        Owner::here().flag()
    )]
    UnknownNetworks {
        /// Podman's id of it.
        container_id: String,
    },

    /// A message that is too long, is not JSON or is not one of ours.
    #[error("cannot read a message on the socket of tailnoded: {cause}")]
    Message {
        /// What is wrong with it.
        cause: io::Error,
    },

    /// An option that does not exist.
    #[error("unknown option `{key}` {place}: {advice}")]
    UnknownOption {
        /// What was given.
        key: String,
        /// Where it was given.
        place: String,
        /// The nearest one, or all there are.
        advice: String,
    },

    /// An option for what Tailscale can do and tailnode cannot.
    #[error("`{key}` {place}: tailnode does not {what} yet: leave it out")]
    MissingFeature {
        /// What was given.
        key: String,
        /// Where it was given.
        place: String,
        /// What it asks for, as a verb.
        what: &'static str,
    },

    /// An auth key where the name of an option should be. Holds nothing of it.
    #[error(
        "an auth key {place}, where an option's name should be: revoke it, since `inspect` shows \
         it, and give a new one to `tailnode login NETWORK`, which asks for it"
    )]
    KeyForOption {
        /// Where it was given.
        place: String,
    },

    /// An option in a place where it is not taken.
    #[error("`{key}` cannot be set {place}: {advice}")]
    MisplacedOption {
        /// The option.
        key: &'static str,
        /// Where it was given.
        place: String,
        /// Where it can be set.
        advice: &'static str,
    },

    /// An option that somebody below has locked.
    #[error("`{key}` cannot be set {place}: the {lock} locks it. {owner}")]
    LockedOption {
        /// The option.
        key: &'static str,
        /// Where it was given.
        place: String,
        /// Who locked it: `network NAME` or `file PATH`.
        lock: String,
        /// Who may change that, and how: a sentence.
        owner: &'static str,
    },

    /// An option with a value that makes no sense. Never holds the value of a secret.
    #[error("`{key}` {place}: {reason}")]
    BadOption {
        /// The option.
        key: &'static str,
        /// Where it was given.
        place: String,
        /// What is wrong, and what is right.
        reason: String,
    },

    /// Two options that exclude each other.
    #[error("`exit-node` and `advertise-exit-node` exclude each other: an exit cannot use another")]
    BothExits,

    /// The configuration file is no TOML, or holds something other than options.
    #[error("{}: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// A file or directory could not be used.
    #[error("cannot {doing} {}: {cause}", path.display())]
    File {
        /// What was tried, as a verb.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        cause: io::Error,
    },

    /// The auth key is not where it should be. Never holds anything of it.
    #[error("cannot use the auth key {place}: {reason}; {advice}")]
    AuthKey {
        /// Where it should be.
        place: String,
        /// What is wrong with it.
        reason: String,
        /// What to do.
        advice: String,
    },

    /// What `tailnode login` was given is no auth key. Never holds anything of it.
    #[error("this is no auth key, and none was kept: {reason}")]
    BadLogin {
        /// What is wrong with it.
        reason: String,
    },

    /// `tailnode login --remove` of what is not there.
    #[error("no auth key is kept for a network called {network}")]
    NoLogin {
        /// What was given.
        network: String,
    },

    /// A second daemon.
    #[error("another tailnoded is running, or still ending: it has {}", path.display())]
    AlreadyRunning {
        /// The socket or the directory that it has.
        path: PathBuf,
    },

    /// A request came without the descriptor that belongs to it.
    #[error(
        "the request brought no TUN device or file: are its program and tailnoded of different \
         versions?"
    )]
    NoDevice,

    /// The container that last had the identity is still being taken down.
    #[error(
        "the node `{hostname}` of an earlier container is still stopping: try again in a few seconds"
    )]
    StillStopping {
        /// The node's hostname.
        hostname: String,
    },

    /// Taken down before it was ready.
    #[error("the container was detached, or tailnoded stopped, while its node was starting")]
    Detached,

    /// Nobody of that name.
    #[error("no container called {container} has a node; `tailnode status` lists those that have")]
    NoContainer {
        /// What was given.
        container: String,
    },

    /// A node that is not to be touched while it runs.
    #[error(
        "the node {hostname} on network {network} belongs to container {container}, which is running: \
         stop that first{}", engine.stop(container)
    )]
    NodeRuns {
        /// The node's hostname.
        hostname: String,
        /// Its network.
        network: String,
        /// The container's engine.
        engine: Engine,
        /// The container.
        container: String,
    },

    /// No such node is kept.
    #[error(
        "no node called {wanted} is kept here, nor one of such a container; what is kept: {known}"
    )]
    NoNode {
        /// What was given.
        wanted: String,
        /// Those that are.
        known: String,
    },

    /// More than one of the name.
    #[error("more than one node is called {wanted} ({list}): say which with --network")]
    ManyNodes {
        /// What was given.
        wanted: String,
        /// Which there are.
        list: String,
    },

    /// A node in the way of one that is imported.
    #[error(
        "there is a node {hostname} on network {network} here already: `tailnode forget {hostname} \
         --network {network}` makes room, or import it with another --network"
    )]
    NodeExists {
        /// The node's hostname.
        hostname: String,
        /// The network.
        network: String,
    },

    /// A file that should hold an exported node.
    #[error("{} holds no node that `tailnode state export` wrote: {reason}", path.display())]
    NotANode {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// A node's state cannot be used.
    #[error(transparent)]
    State(#[from] tailnode_node::StateError),

    /// A person must let the node in, and the container is not to start before that.
    #[error("{cause}; then start the container again (the option `require-login` is set)")]
    LoginRequired {
        /// Who must do what.
        cause: tailnode_node::Error,
    },

    /// The shim's device is not where it belongs.
    #[error(
        "the container's device was not put into its network namespace in time: start the container \
         again, and see what the engine says"
    )]
    DeviceNotMoved,

    /// The node could not start or did not get ready.
    #[error(transparent)]
    Node(#[from] tailnode_node::Error),

    /// The container's device could not be made or set up.
    #[error(transparent)]
    Tun(#[from] tailnode_tun::Error),

    /// Docker could not be asked.
    #[error("cannot ask Docker at {} which container this is: {reason}", socket.display())]
    Docker {
        /// Docker's API socket.
        socket: PathBuf,
        /// What happened.
        reason: String,
    },

    /// An endpoint that Docker has not told of.
    #[error(
        "Docker's endpoint {endpoint} is not known here (was tailnoded restarted?): start the \
         container again"
    )]
    UnknownEndpoint {
        /// Docker's id of it.
        endpoint: String,
    },

    /// A request that is none of a network driver's, or of one that can do more.
    #[error("this network driver has no method {method}")]
    NoMethod {
        /// The request's path.
        method: String,
    },
}

impl Error {
    pub(crate) fn file(
        doing: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |cause| Error::File { doing, path, cause }
    }
}
