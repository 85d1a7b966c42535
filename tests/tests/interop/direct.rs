use crate::scene::*;

pub const CASES: &[Case] = &[
    ("direct.lan", ALL, lan),
    ("direct.ipv6", ALL, ipv6),
    ("direct.nat-both", ALL, nat_both),
    ("direct.nat-shared", ALL, nat_shared),
    ("direct.address-changed", ALL, address_changed),
    ("direct.mapping-changed", ALL, mapping_changed),
];

fn lan(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    direct(&web, &gopher);
    same_bytes(&web, &gopher, 1_000_000);
}

fn ipv6(server: Server) {
    let scene = Scene::new(server);
    let ours = scene.underlay.dual_host();
    let theirs = scene.underlay.dual_host();
    scene.underlay.block_udp();
    let (web, gopher) = scene.pair(ours, theirs);
    direct(&web, &gopher);
    same_bytes(&web, &gopher, 1_000_000);
}

fn nat_both(server: Server) {
    let scene = Scene::new(server);
    let (ours, theirs) = (scene.underlay.nat(), scene.underlay.nat());
    let (web, gopher) = scene.pair(ours.host(), theirs.host());
    direct(&web, &gopher);
    same_bytes(&web, &gopher, 1_000_000);
}

fn nat_shared(server: Server) {
    let scene = Scene::new(server);
    let nat = scene.underlay.nat();
    let (web, gopher) = scene.pair(nat.host(), nat.host());
    direct(&web, &gopher);
    same_bytes(&web, &gopher, 1_000_000);
}

/// The host of one side, then that of the other, has another address all at once.
fn address_changed(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    mid_flow(&web, &gopher, |side| match side {
        0 => web.host.namespace.move_to("10.9.1.9/24", "10.9.1.1"),
        _ => gopher.move_to("10.9.2.9/24", "10.9.2.1"),
    });
}

/// The NAT of one side, then that of the other, forgets its mappings and makes new ones.
fn mapping_changed(server: Server) {
    let scene = Scene::new(server);
    let nats = [scene.underlay.nat(), scene.underlay.nat()];
    let (web, gopher) = scene.pair(nats[0].host(), nats[1].host());
    mid_flow(&web, &gopher, |side| nats[side].forget());
}

/// Streams run while one side's network changes, then the other's; each time the path is direct
/// again soon, and no byte is lost.
fn mid_flow(web: &Ours, gopher: &Gopher, change: impl Fn(usize)) {
    direct(web, gopher);
    let streams = [
        flow(web, gopher, gopher.addresses[0], 8000),
        flow(gopher, web, web.addresses[0], 8001),
    ];
    for side in [0, 1] {
        change(side);
        for stream in &streams {
            flows(stream, PATIENCE);
        }
        // Go's client asks for its public endpoint every 20 s to 26 s.
        within(60, "the path is direct", || {
            web.path_to("gopher") == "direct" && gopher.pings_directly(web.addresses[0], 1).is_ok()
        });
    }
    for stream in streams {
        stream.finish();
    }
}
