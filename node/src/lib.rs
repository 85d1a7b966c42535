//! One node of a tailnet, as a library that knows no container engine.
//!
//! Give [`Node::start`] a TUN device and a place for its keys; it joins the tailnet, finds paths
//! to its peers and moves packets until it is stopped or the device's network namespace dies.

mod addresses;
mod auth_key;
mod carriers;
mod clock;
mod control;
mod derp;
mod device;
mod dial;
mod dns;
pub mod file;
mod filter;
mod neighbours;
mod netcheck;
mod netmap;
mod node;
mod offload;
mod packet;
mod path;
mod router;
mod routes;
mod segment;
mod state;
mod status;
mod udp;
mod wireguard;

pub use auth_key::{AuthKey, BadKey, OauthClient, Secret};
pub use carriers::Carriers;
pub use device::Offload;
pub use dns::Zone;
pub use neighbours::Neighbours;
pub use node::{Config, Error, Identity, Node, Reach, forget};
pub use routes::{ExitNode, Preferences as RoutePreferences, Status as RouteStatus};
pub use segment::Segment;
pub use state::{Error as StateError, export, import, remove};
pub use status::{Login, PeerPath, PeerStatus, Status};

/// The parts that `make bench` measures by themselves, and that its floor is made of. No part of
/// what a node offers.
#[doc(hidden)]
pub mod bench {
    pub use crate::{
        device::{Device, PACKET_ROOM},
        filter::{Filter, Verdict},
        netmap::{Changes, Netmap},
        offload::{Burst, Header, Joiner},
        packet::Packet,
        router::{Out, Router, Taken, To},
        state::Keys,
        udp::{Batch, Udp},
    };
}
