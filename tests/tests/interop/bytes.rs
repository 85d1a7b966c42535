use std::{
    io,
    net::{IpAddr, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{getsockopt, sockopt::TcpMaxSeg},
};
use rustix::net::sockopt::{
    Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover,
};

use crate::scene::*;

pub const CASES: &[Case] = &[
    ("bytes.tcp", ALL, tcp),
    ("bytes.tcp-relay", ALL, tcp_relay),
    ("bytes.udp", ALL, udp),
    ("bytes.udp-relay", ALL, udp_relay),
    ("bytes.connections", ALL, connections),
    ("bytes.connections-relay", ALL, connections_relay),
    ("bytes.mtu", ALL, mtu),
    ("bytes.narrow-path", ALL, narrow_path),
    ("bytes.narrow-path-silent", ALL, narrow_path_silent),
    ("bytes.shaped", ALL, shaped),
];

fn direct_pair(scene: &Scene) -> (Ours, Gopher) {
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    direct(&web, &gopher);
    (web, gopher)
}

fn relayed_pair(scene: &Scene) -> (Ours, Gopher) {
    scene.underlay.block_udp();
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    relayed(&web, &gopher);
    (web, gopher)
}

fn tcp(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = direct_pair(&scene);
    same_bytes(&web, &gopher, 100_000_000);
}

fn tcp_relay(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = relayed_pair(&scene);
    same_bytes(&web, &gopher, 20_000_000);
}

fn udp(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = direct_pair(&scene);
    all_lengths(&web, &gopher);
}

fn udp_relay(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = relayed_pair(&scene);
    all_lengths(&web, &gopher);
}

/// Datagrams of every length that fits into a packet, of some that need fragments, and a long run
/// of one length.
fn all_lengths(web: &Ours, gopher: &Gopher) {
    let whole = 1..=1252;
    let in_fragments = [1253, 1300, 2000, 2504, 2505, 4096, 9000, 20_000, 60_000];
    let run = [1200; 1000];
    let lengths: Vec<usize> = whole.chain(in_fragments).chain(run).collect();
    for (from, to, addresses) in ways(web, gopher) {
        for &address in addresses {
            reach(from, &[address]);
            let delivery = from.datagrams(to, address, &lengths).unwrap();
            let Delivery {
                lost,
                doubled,
                damaged,
            } = delivery;
            assert_eq!((doubled, damaged), (0, 0), "to {address}: {delivery:?}");
            // A busy machine's buffers may overflow now and then.
            assert!(lost <= lengths.len() / 50, "to {address}: {delivery:?}");
        }
    }
}

fn connections(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = direct_pair(&scene);
    many_connections(&web, &gopher);
}

fn connections_relay(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = relayed_pair(&scene);
    many_connections(&web, &gopher);
}

fn many_connections(web: &Ours, gopher: &Gopher) {
    const PORT: u16 = 8000;
    const THREADS: usize = 8;
    const EACH: usize = 125;
    for (from, to, addresses) in ways(web, gopher) {
        let address = addresses[0];
        to.echo_times(PORT, THREADS * EACH).unwrap();
        let one_by_one = |thread| {
            (0..EACH).try_for_each(|number| {
                let bytes = noise((thread * EACH + number) as u64, 100);
                let answer = from.send((address, PORT).into(), &bytes)?;
                assert!(answer == bytes, "{address} returned other bytes");
                Ok(())
            })
        };
        let results: Vec<io::Result<()>> = thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| scope.spawn(move || one_by_one(thread)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        for result in results {
            result.unwrap_or_else(|error| panic!("a connection to {address}: {error}"));
        }
    }
}

/// A packet of the tunnel's MTU passes whole, a larger one is refused to who forbids fragments, and
/// TCP's segments fit.
fn mtu(server: Server) {
    const MTU: usize = 1280;
    // An echo may hold its port for a moment after its last byte.
    let mut echo = 8000;
    let scene = Scene::new(server);
    let (web, gopher) = direct_pair(&scene);
    for (from, to, addresses) in ways(&web, &gopher) {
        for &address in addresses {
            reach(from, &[address]);
            let (any, headers) = match address {
                IpAddr::V4(_) => ("0.0.0.0:0", 20),
                IpAddr::V6(_) => ("[::]:0", 40),
            };
            let receiver = to.run(|| UdpSocket::bind(any)).unwrap();
            receiver
                .set_read_timeout(Some(Duration::from_secs(5)))
                .unwrap();
            let sender = from.run(|| UdpSocket::bind(any)).unwrap();
            match address {
                IpAddr::V4(_) => set_ip_mtu_discover(&sender, Ipv4PathMtuDiscovery::DO),
                IpAddr::V6(_) => set_ipv6_mtu_discover(&sender, Ipv6PathMtuDiscovery::DO),
            }
            .unwrap();
            let port = receiver.local_addr().unwrap().port();
            sender.connect((address, port)).unwrap();
            let full = noise(1, MTU - headers - 8);
            sender.send(&full).unwrap();
            let mut arrived = [0; 2 * MTU];
            let length = receiver.recv(&mut arrived).unwrap();
            assert!(arrived[..length] == full, "to {address}");
            let refused = sender.send(&noise(1, full.len() + 1)).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(Errno::EMSGSIZE as i32));

            echo += 1;
            to.echo(echo).unwrap();
            let stream = from.run(|| TcpStream::connect((address, echo))).unwrap();
            let segment = getsockopt(&stream, TcpMaxSeg).unwrap() as usize;
            assert!((1000..=MTU - headers - 20).contains(&segment), "{segment}");
        }
    }
}

/// A path that full packets of the tunnel do not fit, and that says so.
fn narrow_path(server: Server) {
    for v6 in [false, true] {
        let scene = Scene::new(server);
        let (web, gopher) = pair_on_narrow_paths(&scene, v6);
        same_bytes(&web, &gopher, 3_000_000);
        exchange(&web, &gopher, gopher.addresses[1], 1_000_000);
        exchange(&gopher, &web, web.addresses[1], 1_000_000);
    }
}

/// The same, but it says nothing. Go's client forbids fragments, so that of what it sends only
/// small packets arrive; ours does not.
fn narrow_path_silent(server: Server) {
    let scene = Scene::new(server);
    scene.underlay.block_icmp();
    let (web, gopher) = pair_on_narrow_paths(&scene, false);
    let delivery = web.datagrams(&gopher, gopher.addresses[0], &[1252; 1000]);
    let Delivery { lost, .. } = delivery.unwrap();
    // A busy machine loses some of so many fragments.
    assert!(lost < 150, "{lost} of 1000 are lost");
}

fn pair_on_narrow_paths(scene: &Scene, v6: bool) -> (Ours, Gopher) {
    let underlay = &scene.underlay;
    let narrow = Wire {
        mtu: 1300,
        ..Wire::CLEAN
    };
    let machines = [(); 2].map(|()| {
        let machine = underlay.wired_host(narrow);
        if v6 {
            underlay.add_ipv6(&machine);
        }
        machine
    });
    if v6 {
        underlay.block_udp();
    }
    let (key, [ours, theirs]) = (scene.key(&["--reusable"]), machines);
    let web = scene.ours("web", &key, ours);
    // Its trains of datagrams are lost whole where one is too long for the path.
    let singly = [("TS_DEBUG_DISABLE_UDP_GSO", "1")];
    let gopher = Gopher::join_with(theirs, &scene.url(), &key, "gopher", &singly).unwrap();
    direct(&web, &gopher);
    (web, gopher)
}

fn shaped(server: Server) {
    let scene = Scene::new(server);
    let far = Wire {
        rate: 20_000_000 / 8,
        delay: Duration::from_millis(25),
        loss: 100,
        reorder: 50,
        ..Wire::CLEAN
    };
    let (web, gopher) = scene.pair(scene.underlay.wired_host(far), scene.host());
    direct(&web, &gopher);
    same_bytes(&web, &gopher, 2_000_000);
    let lengths = [1200; 2000];
    for (from, to, addresses) in ways(&web, &gopher) {
        let delivery = from.datagrams(to, addresses[0], &lengths).unwrap();
        assert_eq!((delivery.doubled, delivery.damaged), (0, 0));
    }
}

/// From ours to theirs, and from theirs to ours.
fn ways<'a>(
    web: &'a Ours,
    gopher: &'a Gopher,
) -> [(&'a Namespace, &'a Namespace, &'a [IpAddr]); 2] {
    [
        (web, gopher, &gopher.addresses),
        (gopher, web, &web.addresses),
    ]
}
