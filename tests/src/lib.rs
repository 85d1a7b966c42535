//! Real namespaces, links and processes to test the product in.
//!
//! A scene is built from the outside in: an [`Underlay`] joins hosts, a [`Tailnet`] is the
//! coordination server on it, a [`Host`] runs the daemon, and a [`Container`] is a bare namespace
//! that the host attaches by running the netavark plugin, as Podman would. The peers of others are
//! a [`Gopher`], which is a machine with Tailscale's own client, and as the coordination server
//! [`Headscale`] or [`Testcontrol`], and as a relay a [`Derper`]. A [`Site`] says what a server has
//! besides, and an [`Authority`] certifies it.
//!
//! Nothing here has a name outside the test's process: a namespace lives as long as its file is
//! open and a child process dies with the thread that started it. So a test that panics, or is
//! killed, leaves nothing behind.

#![allow(clippy::expect_used, reason = "a test reports by panicking")]

mod authority;
mod container;
mod crowd;
mod derper;
mod gopher;
mod headscale;
mod host;
mod name_server;
mod namespace;
mod program;
mod proxy;
mod site;
mod tailnet;
mod testcontrol;
mod traffic;
mod underlay;
mod wall_clock;
mod wire;

pub use authority::Authority;
pub use container::Container;
pub use crowd::Crowd;
pub use derper::Derper;
pub use gopher::Gopher;
pub use headscale::Headscale;
pub use host::Host;
pub use name_server::NameServer;
pub use namespace::Namespace;
pub use program::{Process, Release, eventually};
pub use proxy::{Mischief, Proxy};
pub use site::Site;
pub use tailnet::Tailnet;
pub use testcontrol::Testcontrol;
pub use traffic::{Delivery, Flow, noise};
pub use underlay::{Nat, Underlay};
pub use wall_clock::WallClock;
pub use wire::Wire;
