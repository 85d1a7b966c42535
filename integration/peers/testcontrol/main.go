// testcontrol serves the control server of Tailscale's own tests, whose tailnet has one relay.
// Everything is in memory, and everyone may reach everyone. GET /test/rename?name=NAME&to=NAME
// renames a node.
package main

import (
	"flag"
	"log"
	"net/http"
	"net/netip"
	"strings"

	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/dnstype"
)

func main() {
	listen := flag.String("listen", "", "IP:PORT of the control server")
	relay := flag.String("relay", "", "IP:PORT of the relay, which is told to nodes")
	stunPort := flag.Int("stun-port", 3478, "its STUN port")
	domain := flag.String("domain", "", "suffix of all names")
	authKey := flag.String("auth-key", "", "what nodes must know to join")
	record := flag.String("record", "", "NAME=IP that is no node's")
	splitDNS := flag.String("split-dns", "", "ZONE=IP of the DNS server to ask for its names")
	flag.Parse()
	relayAt := netip.MustParseAddrPort(*relay)
	name, address, _ := strings.Cut(*record, "=")
	zone, resolver, _ := strings.Cut(*splitDNS, "=")

	server := &testcontrol.Server{
		ExplicitBaseURL:  "http://" + *listen,
		RequireAuthKey:   *authKey,
		MagicDNSDomain:   *domain,
		AllNodesSameUser: true,
		AllOnline:        true,
		DNSConfig: &tailcfg.DNSConfig{
			Proxied:      true,
			Domains:      []string{*domain},
			Routes:       map[string][]*dnstype.Resolver{*domain: nil, zone: {{Addr: resolver}}},
			ExtraRecords: []tailcfg.DNSRecord{{Name: name, Value: address}},
		},
		DERPMap: &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{1: {
			RegionID:   1,
			RegionCode: "test",
			Nodes: []*tailcfg.DERPNode{{
				Name:     "1a",
				RegionID: 1,
				HostName: relayAt.Addr().String(),
				IPv4:     relayAt.Addr().String(),
				IPv6:     "none",
				DERPPort: int(relayAt.Port()),
				STUNPort: *stunPort,
			}},
		}}},
	}
	http.Handle("/", server)
	http.HandleFunc("/test/rename", func(w http.ResponseWriter, r *http.Request) {
		from, to := r.FormValue("name")+"."+*domain+".", r.FormValue("to")+"."+*domain+"."
		for _, node := range server.AllNodes() {
			if node.Name == from {
				node.Name = to
				server.UpdateNode(node)
				return
			}
		}
		http.Error(w, "no node "+from, http.StatusNotFound)
	})
	log.Fatal(http.ListenAndServe(*listen, nil))
}
