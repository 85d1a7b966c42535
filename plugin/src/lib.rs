//! `tailnoded`, the daemon that runs the nodes of a host's containers, and the API by which the
//! engines' shims and the command line talk to it.
//!
//! [`shim`] and [`api`] are all that a shim needs: they block and bring no runtime. [`daemon`] is the program.
//! In between, [`options`] decides who a container's node is, [`secrets`] what it joins with, the endpoints say which container
//! has which node, and `docker` speaks Docker's plugin protocol. [`owner`] tells a user's own daemon from the host's.

pub mod activation;
pub mod api;
pub mod daemon;
mod docker;
mod endpoints;
mod error;
mod identities;
pub mod inside;
mod interface;
mod on_demand;
pub mod options;
pub mod owner;
mod podman;
pub mod secrets;
pub mod shim;

pub use error::Error;
